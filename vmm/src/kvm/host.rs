//! What the host's KVM must offer.

use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};

use kvm_ioctls::Kvm;

use super::KvmError;

/// Checks that `/dev/kvm`, opened, is one that kiln knows how to use. Gives the version of its API.
///
/// # Errors
/// [`KvmError::Unsupported`] names what it lacks.
pub fn check_host(kvm: OwnedFd) -> Result<i32, KvmError> {
    // SAFETY: the descriptor is owned, and handed over.
    let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
    super::vm::check(&kvm)?;
    Ok(kvm.get_api_version())
}
