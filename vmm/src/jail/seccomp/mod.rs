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
pub mod threads;
pub mod violation;

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

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
/// The rules contradict each other, or the kernel refuses.
pub fn install(lists: &[&[Rule]]) -> Result<(), JailError> {
    seccompiler::apply_filter_all_threads(&compile(lists).map_err(JailError::Filter)?)
        .map_err(JailError::Load)?;
    threads::process_is_confined();
    Ok(())
}

/// Compiles lists into one filter.
fn compile(lists: &[&[Rule]]) -> Result<BpfProgram, BackendError> {
    let mut filter = without_clone3().to_vec();
    filter.extend(allow_list(lists)?);
    Ok(filter)
}

/// Puts a filter on the calling thread, for good. The thread can have no new privileges already.
fn load(filter: &BpfProgram) -> io::Result<()> {
    let length = filter.len().try_into().map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog { len: length, filter: filter.as_ptr().cast_mut().cast() };
    // SAFETY: the header points at `len` instructions of the layout of `struct sock_filter`, which live
    // until the call returns; the kernel copies and checks them.
    let result = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What stands before a filter so that `clone3` isn't there, whatever the architecture that a call
/// claims to be for: load the call's number (`struct seccomp_data`), return unless it is another.
const fn without_clone3() -> [sock_filter; 3] {
    const NUMBER: u32 = 0;
    let answer = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    [
        sock_filter { code: LOAD, jt: 0, jf: 0, k: NUMBER },
        sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: libc::SYS_clone3 as u32 },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: answer },
    ]
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn allow_list(lists: &[&[Rule]]) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in lists.iter().copied().flatten() {
        let alternatives = rules.entry(rule.call).or_default();
        if !rule.when.is_empty() {
            alternatives.push(SeccompRule::new(conditions(rule)?)?);
        }
    }
    // A call with a rule without conditions is free, whatever other rules say.
    for rule in lists.iter().copied().flatten().filter(|rule| rule.when.is_empty()) {
        rules.insert(rule.call, vec![]);
    }
    SeccompFilter::new(rules, SeccompAction::Trap, SeccompAction::Allow, TargetArch::x86_64)?
        .try_into()
}

fn conditions(rule: &Rule) -> Result<Vec<SeccompCondition>, BackendError> {
    rule.when
        .iter()
        .map(|when| {
            let (argument, operator, value) = match *when {
                When::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
                When::Lacks(argument, bits) => {
                    (argument, SeccompCmpOp::MaskedEq(u64::from(bits)), 0)
                }
                When::IsOwnPid(argument) => (argument, SeccompCmpOp::Eq, std::process::id()),
            };
            SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, u64::from(value))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_compiles() {
        for lists in [VMM, DEVICES] {
            assert!(allow_list(lists).unwrap().len() > 100);
        }
    }

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
