//! Attempts to get out: hostile bundles, a guest whose agent was taken over, and one whose drivers keep
//! to no rule.
//!
//! Hostile programs in the jails' places are `vmm/tests/jail`'s.
//! These tests need root, `/dev/kvm`, QEMU, gcc, a static busybox at /bin/busybox, and the guest's kernel and
//! agent, as those in `tests/kiln` do.

// What fails here is the test.
#![allow(clippy::expect_used, clippy::unwrap_used)]

mod agent;
mod bundles;
mod devices;
mod floods;
mod outside;
#[path = "../vmm/process.rs"]
mod process;
#[allow(dead_code, reason = "these tests use a part of it")]
mod script;
mod share;
#[path = "../kiln/stage.rs"]
#[allow(dead_code, reason = "these tests use a part of it")]
mod stage;
mod step;
#[path = "../../vmm/tests/tap/mod.rs"]
mod tap;
mod witness;
