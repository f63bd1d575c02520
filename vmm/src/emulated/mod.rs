//! The emulated engine: QEMU's software CPU with kiln's own devices over vhost-user.
//!
//! It is for development and tests on hosts whose KVM can't run Linux, and no security boundary:
//! QEMU's software CPU has never been one.

pub mod clock;
pub mod devices;
pub mod qemu;
