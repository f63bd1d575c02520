//! Containers set up for real: the agent runs in namespaces of this machine instead of a guest, over
//! Unix sockets instead of vsock, with busybox as the root file system. Needs root.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a failure anywhere in a test is the test's"
)]

mod booted;
mod clock;
mod controlled;
mod devices;
mod exec;
mod guest;
mod hooks;
#[path = "../../../tests/initramfs/mod.rs"]
mod initramfs;
mod lifecycle;
mod network;
mod pods;
mod process;
mod questions;
mod rootfs;
mod seccomp;
mod stdio;
