//! System-call allow-lists.
//!
//! A list is a slice of [`Rule`]s. A call that no rule allows raises `SIGSYS` in the thread that
//! made it; [`violation`] then names it, to the log and to the monitor, and ends the process with
//! [`violation::EXIT_STATUS`]. (To kill in the filter would leave only "killed by SIGSYS" to tell.)
//! No list allows to change the action of `SIGSYS`, so whoever takes the process over can't change
//! that, and a blocked `SIGSYS` kills.
//!
//! Threads put narrower lists on themselves: see [`threads`].
//!
//! `clone3` is answered with `ENOSYS`, for its flags are in memory where a filter can't see them:
//! the C library then calls `clone`, which is allowed for threads only.

pub mod denied;
pub mod ioctl;
mod lists;
pub mod names;
mod program;
pub mod threads;
pub mod violation;

use std::io;

use seccompiler::sock_filter;

pub use self::lists::{
    COMMON, COPIES, DESCRIPTORS, DEVICES, DISKS, EVENTS, MESSAGES, SOCKETS, STARTS, VMM,
};
use super::JailError;

/// One system call that is allowed, if all conditions hold. A call may have several rules.
#[derive(Debug, Clone, Copy)]
pub struct Rule {
    /// Its number.
    pub call: libc::c_long,
    /// What must hold for its arguments.
    pub when: &'static [When],
}

/// A condition on an argument. Arguments count from 0; only their lower 32 bits count, as for the
/// kernel, which takes an `int` in all calls that the lists put conditions on.
#[derive(Debug, Clone, Copy)]
pub enum When {
    /// It equals the value.
    Is(u8, u32),
    /// None of these bits is set.
    Lacks(u8, u32),
    /// It is the process's own pid.
    IsOwnPid(u8),
}

/// A rule without conditions.
#[must_use]
pub const fn allow(call: libc::c_long) -> Rule {
    Rule { call, when: &[] }
}

/// A rule with conditions.
#[must_use]
pub const fn allow_when(call: libc::c_long, when: &'static [When]) -> Rule {
    Rule { call, when }
}

/// Compiles the lists into one filter and puts it on every thread of the process, for good.
///
/// # Errors
/// The kernel refuses.
pub fn install(lists: &[&[Rule]]) -> Result<(), JailError> {
    seccompiler::apply_filter_all_threads(&program::compile(lists)).map_err(JailError::Load)?;
    threads::process_is_confined();
    Ok(())
}

/// Puts a filter on the calling thread, for good. The thread can have no new privileges already.
fn load(filter: &[sock_filter]) -> io::Result<()> {
    let length = filter.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: the header points at `len` instructions of the layout of `struct sock_filter`, which live
    // until the call returns; the kernel copies and checks them.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_list_allows_what_leads_out() {
        let forbidden = [
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_fork,
            libc::SYS_vfork,
            libc::SYS_ptrace,
            libc::SYS_kill,
            libc::SYS_process_vm_readv,
            libc::SYS_process_vm_writev,
            libc::SYS_pidfd_getfd,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_keyctl,
            libc::SYS_io_uring_setup,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_setuid,
            libc::SYS_open_by_handle_at,
            libc::SYS_perf_event_open,
            libc::SYS_chroot,
        ];
        for lists in [VMM, DEVICES] {
            for rule in lists.iter().copied().flatten() {
                assert!(!forbidden.contains(&rule.call), "{:?}", names::name(rule.call));
            }
        }
    }
}
