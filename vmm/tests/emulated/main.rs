//! The devices as QEMU's guest finds them: a real Linux driver on the other side of vhost-user.
//!
//! Needs QEMU, gcc and the guest kernel.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod block;
mod guest;
mod network;
#[path = "../tap/mod.rs"]
mod tap;
mod vsock;
