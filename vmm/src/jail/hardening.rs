//! What a jailed process forswears about itself.

use std::io;

use capctl::prctl;

use super::error::{During, JailError};

/// No exec gains privileges, nobody of the same uid may trace the process or read its memory, and
/// it never makes memory executable that was writable.
///
/// # Errors
/// The kernel refuses. One older than 6.3 doesn't know the last promise; seccomp keeps it there.
pub fn apply() -> Result<(), JailError> {
    no_new_privileges()?;
    prctl::set_dumpable(false)
        .map_err(|error| io::Error::from_raw_os_error(error.code()))
        .during("make the process undumpable")?;
    match prctl::set_mdwe(prctl::MDWEFlags::REFUSE_EXEC_GAIN) {
        Err(error) if error.code() != libc::EINVAL => {
            Err(io::Error::from_raw_os_error(error.code()))
                .during("forbid memory that is both writable and executable")
        }
        _ => Ok(()),
    }
}

/// No exec gains privileges any more.
///
/// # Errors
/// The kernel refuses.
pub fn no_new_privileges() -> Result<(), JailError> {
    prctl::set_no_new_privs()
        .map_err(|error| io::Error::from_raw_os_error(error.code()))
        .during("forbid new privileges")
}

/// Has all threads take memory from one heap, before there are any. The C library gives each its own
/// otherwise, at several system calls a thread; and when one gives memory back, the library looks a file
/// up in `/proc` (glibc, `check_may_shrink_heap`), which no process in a jail may.
pub fn share_one_heap() {
    // SAFETY: sets a number that the allocator reads.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
}
