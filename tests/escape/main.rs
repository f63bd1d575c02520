//! Attempts to get out: hostile bundles, and a guest whose agent was taken over.
//!
//! Hostile programs in the jails' places are `vmm/tests/jail`'s, hostile drivers `vmm/tests`'.
//! These tests need root, QEMU, gcc, a static busybox at /bin/busybox, and the guest's kernel and
//! agent, as those in `tests/kiln` do.

// What fails here is the test.
#![allow(clippy::expect_used)]

mod agent;
mod bundles;
#[path = "../kiln/stage.rs"]
#[allow(dead_code, reason = "these tests use a part of it")]
mod stage;
