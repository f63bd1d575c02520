//! What the fs backend process gives up before it reads a guest's first byte.
//!
//! It must make files for any owner and so stays the user it was started as, with the capabilities
//! for that and no others. `CAP_SYS_ADMIN` is not among them: `trusted.*` attributes stay out of the
//! guest's reach. Nor is `CAP_DAC_READ_SEARCH`: with it a file handle, which can be guessed, opens any
//! file of a file system that a share lies on. So each file that the guest knows is one that the
//! process has open.
//!
//! The capabilities are kept while a thread takes on the user of a request (`SECBIT_NO_SETUID_FIXUP`):
//! whether that user may do what it asks is for the guest's kernel to say, which knows its groups,
//! capabilities and user namespaces. A second opinion from the host's kernel could only be wrong, as
//! it is where a supplementary group owns a volume.

use std::io;
use std::os::fd::BorrowedFd;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{
    CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
    remove_capability_from_bounding_set, set_capabilities, set_capabilities_secure_bits,
    unshare_unsafe,
};

use crate::jail::seccomp::{self, Rule, When, allow, allow_when};
use crate::jail::{JailError, hardening, landlock, parent};

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
    /// A step that all jails have.
    #[error(transparent)]
    Jail(#[from] JailError),
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

/// Leaves the host's network, IPC, names and cgroups. The calling process must have a single thread.
///
/// # Errors
/// Without `CAP_SYS_ADMIN`.
pub fn leave_namespaces() -> Result<(), ConfinementError> {
    let flags = UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: no file descriptor table is unshared.
    system("make network, IPC, UTS and cgroup namespaces", unsafe { unshare_unsafe(flags) })
}

/// Drops every capability but those for making files, and the ways to others, for good; from then on
/// the process dies with the one that started it, which holds the other end of `control`, and reaches
/// no process outside. The calling process must have a single thread.
///
/// # Errors
/// When one of those is missing, or without `CAP_SETPCAP`.
pub fn drop_privileges(control: BorrowedFd<'_>) -> Result<(), ConfinementError> {
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
        "drop capabilities; it needs CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID, MKNOD and \
         SETFCAP, as root has them",
        set_capabilities(None, sets),
    )?;
    hardening::apply()?;
    parent::die_with_it(Some(control))?;
    landlock::deny_beyond_files()?;
    Ok(())
}

/// What serving takes besides what every process of a sandbox may do: files by name and whatever is
/// done to them, the user of a request, and the frontend's connection.
const SERVING: &[Rule] = &[
    // Files by name.
    allow(libc::SYS_openat),
    allow(libc::SYS_openat2),
    allow(libc::SYS_mkdirat),
    allow(libc::SYS_mknodat),
    allow(libc::SYS_symlinkat),
    allow(libc::SYS_linkat),
    allow(libc::SYS_unlinkat),
    allow(libc::SYS_renameat2),
    allow(libc::SYS_readlinkat),
    allow(libc::SYS_newfstatat),
    allow(libc::SYS_statx),
    allow(libc::SYS_fchmodat),
    allow(libc::SYS_fchownat),
    allow(libc::SYS_utimensat),
    allow(libc::SYS_setxattr),
    allow(libc::SYS_getxattr),
    allow(libc::SYS_listxattr),
    allow(libc::SYS_removexattr),
    // Open files.
    allow(libc::SYS_preadv2),
    allow(libc::SYS_pwritev2),
    allow(libc::SYS_getdents64),
    allow(libc::SYS_fstatfs),
    allow(libc::SYS_ftruncate),
    allow(libc::SYS_copy_file_range),
    allow(libc::SYS_syncfs),
    allow(libc::SYS_fchmod),
    allow(libc::SYS_fchown),
    allow(libc::SYS_fsetxattr),
    allow(libc::SYS_fgetxattr),
    allow(libc::SYS_flistxattr),
    allow(libc::SYS_fremovexattr),
    // Who a request is served as.
    allow(libc::SYS_setresuid),
    allow(libc::SYS_setresgid),
    allow(libc::SYS_setgroups),
    allow(libc::SYS_geteuid),
    allow(libc::SYS_getegid),
    allow(libc::SYS_capget),
    allow(libc::SYS_capset),
    allow(libc::SYS_umask),
    allow(libc::SYS_fchdir),
    allow_when(libc::SYS_unshare, &[When::Is(0, libc::CLONE_FS as u32)]),
    // The frontend.
    allow(libc::SYS_accept4),
];

/// Restricts all threads of the process to the system calls that serving takes. Any other is
/// reported on `control`, which stays open, and ends the process.
///
/// # Errors
/// When the filter can't be installed.
pub fn restrict_system_calls(control: BorrowedFd<'_>) -> Result<(), ConfinementError> {
    seccomp::violation::report_to("fs", Some(control));
    Ok(seccomp::install(&[
        seccomp::COMMON,
        seccomp::STARTS,
        seccomp::DESCRIPTORS,
        seccomp::COPIES,
        seccomp::EVENTS,
        seccomp::DISKS,
        seccomp::MESSAGES,
        seccomp::SOCKETS,
        SERVING,
    ])?)
}
