//! What the fs backend process gives up before it reads a guest's first byte.
//!
//! It must make files for any owner and so stays the user it was started as, with the capabilities
//! for that and no others. `CAP_SYS_ADMIN` is not among them: `trusted.*` attributes stay out of the
//! guest's reach.
//!
//! The capabilities are kept while a thread takes on the user of a request (`SECBIT_NO_SETUID_FIXUP`):
//! whether that user may do what it asks is for the guest's kernel to say, which knows its groups,
//! capabilities and user namespaces. A second opinion from the host's kernel could only be wrong, as
//! it is where a supplementary group owns a volume.

use std::collections::BTreeMap;
use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    set_no_new_privs, unshare_unsafe,
};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

/// Memory that the process may allocate, in bytes: what it keeps about the files that the guest
/// knows grows with their number, at about a kibibyte each. Beyond it the process aborts, and with
/// it the sandbox.
const MAX_DATA: u64 = 1 << 30;

/// How many files the process asks to have open, should it be allowed to: the kernel's default
/// ceiling (`fs.nr_open`).
const WANTED_FILES: u64 = 1 << 20;

/// Files that the process opens for itself: event fds, sockets, guest memory, one or two for the
/// length of a request.
const OWN_FILES: u64 = 128;

const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::DAC_READ_SEARCH)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::SETFCAP);

/// Why the process could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// A system call.
    #[error("cannot {what}")]
    System {
        /// What it was to do.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The seccomp filter.
    #[error("cannot restrict system calls: {0}")]
    Filter(String),
}

fn system<T>(what: &'static str, result: rustix::io::Result<T>) -> Result<T, ConfinementError> {
    result.map_err(|errno| ConfinementError::System { what, source: errno.into() })
}

/// Sets the limits and returns how many files may be open on the guest's behalf.
///
/// # Errors
/// When a limit can't be set, or is too low to serve anything.
pub fn limit() -> Result<u64, ConfinementError> {
    // SAFETY: no handler is installed. A write beyond RLIMIT_FSIZE then fails with EFBIG, instead of
    // ending the process.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    let only = |value| Rlimit { current: Some(value), maximum: Some(value) };
    system("forbid core dumps", setrlimit(Resource::Core, only(0)))?;
    system("limit memory", setrlimit(Resource::Data, only(MAX_DATA)))?;
    if setrlimit(Resource::Nofile, only(WANTED_FILES)).is_err() {
        let maximum = getrlimit(Resource::Nofile).maximum;
        let raised = Rlimit { current: maximum, maximum };
        system("raise the limit of open files", setrlimit(Resource::Nofile, raised))?;
    }
    let files = getrlimit(Resource::Nofile).current.unwrap_or(WANTED_FILES);
    files.checked_sub(OWN_FILES).filter(|left| *left >= OWN_FILES).ok_or_else(|| {
        ConfinementError::System {
            what: "serve files: the limit of open files (ulimit -n) is below 256",
            source: io::Error::from_raw_os_error(libc::EMFILE),
        }
    })
}

/// Leaves the host's network, IPC and names. The calling process must have a single thread.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn leave_namespaces() -> Result<(), ConfinementError> {
    let flags = UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: no file descriptor table is unshared.
    system("make network, IPC and UTS namespaces", unsafe { unshare_unsafe(flags) })
}

/// Drops every capability but those for making files, for good. The calling process must have a
/// single thread.
///
/// # Errors
/// When one of those is missing, or without `CAP_SETPCAP`.
pub fn drop_capabilities() -> Result<(), ConfinementError> {
    let bits = CapabilitiesSecureBits::NO_SETUID_FIXUP
        | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
        | CapabilitiesSecureBits::NO_ROOT
        | CapabilitiesSecureBits::NO_ROOT_LOCKED
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
        | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED;
    system("keep capabilities across users", set_capabilities_secure_bits(bits))?;
    for capability in CapabilitySet::all().difference(KEPT).iter() {
        match remove_capability_from_bounding_set(capability) {
            // The kernel doesn't know that one.
            Err(rustix::io::Errno::INVAL) => {}
            result => system("drop a capability", result)?,
        }
    }
    let sets =
        CapabilitySets { effective: KEPT, permitted: KEPT, inheritable: CapabilitySet::empty() };
    system(
        "drop capabilities; it needs CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, \
         SETUID, MKNOD and SETFCAP, as root has them",
        set_capabilities(None, sets),
    )?;
    system("forbid new privileges", set_no_new_privs(true))
}

/// System calls that are always allowed.
const ALLOWED: &[libc::c_long] = &[
    // Files by name.
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_symlinkat,
    libc::SYS_linkat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_readlinkat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_utimensat,
    libc::SYS_setxattr,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_removexattr,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    // Open files.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_getdents64,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_copy_file_range,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_syncfs,
    libc::SYS_fchmod,
    libc::SYS_fchown,
    libc::SYS_fsetxattr,
    libc::SYS_fgetxattr,
    libc::SYS_flistxattr,
    libc::SYS_fremovexattr,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_close,
    // Who a request is served as.
    libc::SYS_setresuid,
    libc::SYS_setresgid,
    libc::SYS_setgroups,
    libc::SYS_geteuid,
    libc::SYS_getegid,
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_umask,
    libc::SYS_fchdir,
    // vhost-user and events.
    libc::SYS_accept4,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_eventfd2,
    // Memory, threads and time.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_futex,
    libc::SYS_clone3,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_tgkill,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// What `pthread_create` passes to `clone`.
const THREAD_FLAGS: u64 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

fn argument(index: u8, operator: SeccompCmpOp, value: u64) -> Result<Vec<SeccompRule>, String> {
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Qword, operator, value);
    let rule = condition.and_then(|condition| SeccompRule::new(vec![condition]));
    Ok(vec![rule.map_err(|error| error.to_string())?])
}

fn rules() -> Result<BTreeMap<i64, Vec<SeccompRule>>, String> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|number| (*number, Vec::new())).collect();
    let not_executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
    rules.insert(libc::SYS_mmap, argument(2, not_executable.clone(), 0)?);
    rules.insert(libc::SYS_mprotect, argument(2, not_executable, 0)?);
    rules.insert(libc::SYS_clone, argument(0, SeccompCmpOp::Eq, THREAD_FLAGS)?);
    rules.insert(libc::SYS_unshare, argument(0, SeccompCmpOp::Eq, libc::CLONE_FS as u64)?);
    rules.insert(libc::SYS_prctl, argument(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?);
    Ok(rules)
}

/// Restricts all threads of the process to the system calls that serving takes. Any other ends the
/// process with `SIGSYS`.
///
/// # Errors
/// When the filter can't be installed.
pub fn restrict_system_calls() -> Result<(), ConfinementError> {
    let install = |rules, otherwise, matched| -> Result<(), String> {
        let filter = SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64);
        let program = filter.and_then(seccompiler::BpfProgram::try_from);
        let program = program.map_err(|error| error.to_string())?;
        seccompiler::apply_filter_all_threads(&program).map_err(|error| error.to_string())
    };
    // glibc falls back to `clone`, whose flags a filter can see.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let absent = SeccompAction::Errno(libc::ENOSYS as u32);
    let installed = install(clone3, SeccompAction::Allow, absent)
        .and_then(|()| install(rules()?, SeccompAction::KillProcess, SeccompAction::Allow));
    installed.map_err(ConfinementError::Filter)
}
