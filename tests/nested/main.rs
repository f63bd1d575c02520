//! kiln inside of a guest of kiln: hosts that this machine isn't.
//!
//! What kiln does with cgroups depends on the host: version 2 with controllers, systemd as its first
//! process. A guest's kernel has the one, and can run the other. So each test is a step, with the
//! distribution's programs and kiln's own, that runs the test again: in there it is on such a host. A
//! machine within the machine takes a minute to boot under two software CPUs; what doesn't need it
//! doesn't wait for it.
//!
//! These tests need root, QEMU, systemd and dbus as programs, a static busybox at /bin/busybox, and the
//! guest's kernel and agent, as those in `tests/kiln` do. Nothing is started on this machine but kiln.

// What fails here is the test.
#![allow(clippy::expect_used)]

mod cgroupfs;
mod host;
mod memory_events;
#[path = "../kiln/stage.rs"]
#[allow(dead_code, reason = "these tests use a part of it")]
mod stage;
mod systemd;
