//! A descriptor that the runtime waits for.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has the runtime wait for a descriptor to become readable. Must be called within the runtime.
///
/// # Errors
/// The descriptor is of a kind that can't be waited for.
pub fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    register_for(fd, Interest::READABLE)
}

/// Has the runtime wait for a descriptor as `interest` says, likewise.
///
/// # Errors
/// As [`register`].
pub fn register_for(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` is open for as long as it lives and never changes its number.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}
