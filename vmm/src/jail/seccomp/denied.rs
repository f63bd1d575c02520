//! What a process may not call that can't have a list of what it may: a program that isn't ours, whose
//! own filter, if it has one, comes on top, and ours that stand for programs in a guest.
//!
//! A call that is on the list fails with `EPERM` and nothing is reported: a program may try what its
//! kernel has (`io_uring`) and go on without.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use crate::jail::JailError;

/// Calls that fail whatever their arguments are.
const DENIED: &[libc::c_long] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_kcmp,
    libc::SYS_pidfd_getfd,
    libc::SYS_perf_event_open,
    // Large or seldom used parts of the kernel.
    libc::SYS_bpf,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_userfaultfd,
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_fanotify_init,
    libc::SYS_modify_ldt,
    libc::SYS_vmsplice,
    // Files other than by name, and mounts.
    libc::SYS_open_by_handle_at,
    libc::SYS_name_to_handle_at,
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_quotactl,
    libc::SYS_acct,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    // Who and where the process is.
    libc::SYS_unshare,
    libc::SYS_setns,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setfsuid,
    libc::SYS_setfsgid,
    libc::SYS_setgroups,
    libc::SYS_capset,
    // The machine as a whole.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_adjtimex,
    libc::SYS_clock_adjtime,
    libc::SYS_iopl,
    libc::SYS_ioperm,
];

/// Flags with which `clone` makes namespaces.
const NAMESPACES: &[libc::c_int] = &[
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWNS,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];

/// Numbers from here on are calls of the x32 interface (`__X32_SYSCALL_BIT`), which no list has.
const X32: u32 = 0x4000_0000;

/// Compiles the list. Sockets other than Unix ones, and typing into terminals, are on it too.
///
/// # Errors
/// The rules contradict each other.
pub fn compile() -> Result<BpfProgram, JailError> {
    let mut program = without_x32_and_clone3().to_vec();
    program.extend(deny_list()?);
    Ok(program)
}

/// Puts the list on the calling thread and those that it starts, for good.
///
/// # Errors
/// As [`compile`]; and the kernel refuses.
pub fn install() -> Result<(), JailError> {
    seccompiler::apply_filter(&compile()?).map_err(JailError::Load)
}

/// The beginning of a program: calls of x32 are denied, and `clone3`, whose flags are in memory where no
/// filter sees them, isn't there: the C library calls `clone` then. What is neither passes on to the next
/// instruction.
fn without_x32_and_clone3() -> [sock_filter; 5] {
    const PASS: u8 = 1;
    let instruction = |code: u32, jumps: (u8, u8), k| {
        let (jt, jf) = jumps;
        sock_filter { code: code as u16, jt, jf, k }
    };
    let number = instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), 0);
    let at_least = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
    let equal = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    let answer = |error: i32| {
        let answer = libc::SECCOMP_RET_ERRNO | error as u32;
        instruction(libc::BPF_RET | libc::BPF_K, (0, 0), answer)
    };
    [
        number,
        instruction(at_least, (0, PASS), X32),
        answer(libc::EPERM),
        instruction(equal, (0, PASS), libc::SYS_clone3 as u32),
        answer(libc::ENOSYS),
    ]
}

fn deny_list() -> Result<BpfProgram, JailError> {
    let when = |argument, operator, value| {
        let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
        SeccompRule::new(vec![condition])
    };
    let build = || {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
            DENIED.iter().map(|call| (*call, vec![])).collect();
        let not_unix = when(0, SeccompCmpOp::Ne, libc::AF_UNIX as u64)?;
        rules.insert(libc::SYS_socket, vec![not_unix]);
        rules.insert(libc::SYS_ioctl, vec![when(1, SeccompCmpOp::Eq, libc::TIOCSTI)?]);
        let namespaces = NAMESPACES.iter().map(|flag| {
            let flag = *flag as u64;
            when(0, SeccompCmpOp::MaskedEq(flag), flag)
        });
        rules.insert(libc::SYS_clone, namespaces.collect::<Result<_, _>>()?);
        let denied = SeccompAction::Errno(libc::EPERM as u32);
        SeccompFilter::new(rules, SeccompAction::Allow, denied, TargetArch::x86_64)?.try_into()
    };
    build().map_err(JailError::Filter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_compiles() {
        assert!(compile().unwrap().len() > DENIED.len());
    }
}
