//! The kiln binary from outside: what it refuses, what it runs, and what it leaves behind.
//!
//! Tests that run guests need root, QEMU, a static busybox at /bin/busybox, and the guest's kernel
//! and agent in the folder that `KILN_LIB_DIR` names, or in `out/lib/kiln`.

// What fails here is the test.
#![allow(clippy::expect_used)]

mod bad_input;
mod cgroup;
mod command_line;
mod debug;
mod exec;
mod figures;
mod hooks;
mod jail;
mod lifecycle;
mod limits;
mod metrics;
mod namespaces;
mod network;
mod overlay;
mod pause;
mod pidfd_socket;
mod pods;
mod rootfs;
mod run;
mod spec;
mod stage;
mod terminal;
mod trace;
mod unread;
mod vm;
