//! Landlock: a second refusal, by another part of the kernel, of what the empty root and seccomp
//! refuse already.
//!
//! [`deny_all`] handles every right that the running kernel's Landlock knows and grants none: no file
//! may be opened, created, executed or removed by path, no TCP port bound or connected to, no abstract
//! Unix socket and no process outside of the jail reached. What is open already stays usable. The other
//! two leave a program what it can't do without. Source: `include/uapi/linux/landlock.h`.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::error::{During, JailError, checked};

/// `LANDLOCK_ACCESS_FS_EXECUTE`, and the rights to read files and directories.
const EXECUTE: u64 = 1 << 0;
const READ: u64 = 1 << 2 | 1 << 3;

/// `struct landlock_ruleset_attr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct RulesetAttr {
    handled_access_fs: u64,
    handled_access_net: u64,
    scoped: u64,
}

/// `LANDLOCK_CREATE_RULESET_VERSION`.
const CREATE_RULESET_VERSION: u32 = 1;

/// Forbids everything that Landlock can forbid, to this thread and those it starts. Returns the
/// kernel's Landlock version, 0 where there is none.
///
/// # Errors
/// The kernel has Landlock but refuses, for instance for lack of `no_new_privs`.
pub fn deny_all() -> Result<u32, JailError> {
    restrict(everything)
}

/// The same, but files may be read and executed. Makes system calls only.
///
/// # Errors
/// As [`deny_all`].
pub fn deny_changes() -> Result<u32, JailError> {
    restrict(|version| {
        let all = everything(version);
        RulesetAttr { handled_access_fs: all.handled_access_fs & !(READ | EXECUTE), ..all }
    })
}

/// The same, but files are left out: where any right to them is handled, no file is linked or moved to
/// another directory.
///
/// # Errors
/// As [`deny_all`].
pub fn deny_beyond_files() -> Result<u32, JailError> {
    restrict(|version| RulesetAttr { handled_access_fs: 0, ..everything(version) })
}

/// The kernel's Landlock version, 0 where there is none.
///
/// # Errors
/// The kernel doesn't say.
pub fn version() -> Result<u32, JailError> {
    // SAFETY: with this flag the call reads no memory and returns a number.
    let version = checked(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            std::ptr::null::<RulesetAttr>(),
            0usize,
            CREATE_RULESET_VERSION,
        )
    });
    match version {
        Ok(version) => Ok(u32::try_from(version).unwrap_or(0)),
        Err(error) if is_absence(&error) => Ok(0),
        Err(error) => Err(error).during("ask for the version of Landlock"),
    }
}

/// Forbids what `handled` makes of the kernel's version, which is returned.
fn restrict(handled: impl FnOnce(u32) -> RulesetAttr) -> Result<u32, JailError> {
    let version = version()?;
    let handled = if version == 0 { RulesetAttr::default() } else { handled(version) };
    if handled == RulesetAttr::default() {
        return Ok(version);
    }
    // SAFETY: the pointer and length describe `handled`, which the kernel only reads.
    let ruleset = checked(unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            &raw const handled,
            size_of::<RulesetAttr>(),
            0u32,
        )
    })
    .during("create a Landlock ruleset")?;
    // SAFETY: the call has just returned this descriptor, which no one else knows.
    let ruleset = unsafe { OwnedFd::from_raw_fd(ruleset as i32) };
    // SAFETY: plain numbers.
    checked(unsafe { libc::syscall(libc::SYS_landlock_restrict_self, ruleset.as_raw_fd(), 0u32) })
        .during("enforce the Landlock ruleset")?;
    Ok(version)
}

/// Not compiled in, or not switched on at boot.
fn is_absence(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EOPNOTSUPP))
}

/// Every right that a version knows; the kernel refuses rulesets with others.
fn everything(version: u32) -> RulesetAttr {
    // Version 1 has 13 file rights; 2 adds refer, 3 truncate, 5 device ioctls.
    let files = match version {
        0 | 1 => 13,
        2 => 14,
        3 | 4 => 15,
        _ => 16,
    };
    RulesetAttr {
        handled_access_fs: (1 << files) - 1,
        // bind and connect of TCP.
        handled_access_net: if version >= 4 { 3 } else { 0 },
        // Abstract Unix sockets and signals.
        scoped: if version >= 6 { 3 } else { 0 },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_version_is_asked_for_rights_it_does_not_know() {
        assert_eq!(everything(1).handled_access_fs, 0x1fff);
        assert_eq!(everything(5).handled_access_fs, 0xffff);
        assert_eq!((everything(3).handled_access_net, everything(5).scoped), (0, 0));
        assert_eq!((everything(4).handled_access_net, everything(7).scoped), (3, 3));
    }
}
