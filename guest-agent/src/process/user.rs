//! The user, groups and umask of a process (`process.user`).

use std::io;

use oci_spec::runtime::User;

/// Who a process is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id in the container.
    pub uid: u32,
    /// Group id in the container.
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
    /// File mode creation mask.
    pub umask: u32,
}

/// runc's umask where the configuration has none.
const DEFAULT_UMASK: u32 = 0o022;

impl Identity {
    /// Reads `process.user`.
    pub fn from_spec(user: &User) -> Self {
        Self {
            uid: user.uid(),
            gid: user.gid(),
            groups: user.additional_gids().clone().unwrap_or_default(),
            umask: user.umask().unwrap_or(DEFAULT_UMASK) & 0o777,
        }
    }

    /// Makes the calling process this user, keeping its permitted capabilities. No thread but the
    /// calling one may exist.
    ///
    /// # Errors
    /// `EINVAL` for an id that the user namespace doesn't map.
    pub fn assume(&self) -> io::Result<()> {
        // SAFETY: umask(2) takes a number.
        unsafe { libc::umask(self.umask) };
        check(
            // SAFETY: plain numbers; the wrapper's signalling of other threads doesn't arise.
            || unsafe { libc::syscall(libc::SYS_prctl, libc::PR_SET_KEEPCAPS, 1, 0, 0, 0) },
        )?;
        check(
            // SAFETY: the pointer and the count are those of a live vector of gid_t.
            || unsafe {
                libc::syscall(libc::SYS_setgroups, self.groups.len(), self.groups.as_ptr())
            },
        )?;
        // SAFETY: plain numbers.
        check(|| unsafe { libc::syscall(libc::SYS_setresgid, self.gid, self.gid, self.gid) })?;
        // SAFETY: plain numbers.
        check(|| unsafe { libc::syscall(libc::SYS_setresuid, self.uid, self.uid, self.uid) })?;
        Ok(())
    }
}

fn check(call: impl FnOnce() -> libc::c_long) -> io::Result<()> {
    if call() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
