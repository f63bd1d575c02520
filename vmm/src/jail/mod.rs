//! The jail of each host process of a sandbox.
//!
//! A process of a sandbox reads what a hostile guest writes, so it is assumed to fall. What is left
//! to whoever takes it over is decided here, before the first guest byte is read: the descriptors
//! it was handed, and a few system calls on them.
//!
//! [`Jail::enter`] takes these steps, each a module of its own, in the only order that works:
//!
//! 1. [`descriptors`]: closes every descriptor that isn't listed, and checks `/proc/self/fd`.
//! 2. [`limits`]: no core dumps, few descriptors and threads.
//! 3. [`namespaces`]: new ones; without root a user namespace first, which allows the rest.
//! 4. [`root`]: an empty read-only root directory, everything else unmounted.
//! 5. [`capabilities`]: none in any of the five sets, securebits locked.
//! 6. [`identity`]: an unprivileged user and group of the sandbox's own.
//! 7. [`hardening`]: no new privileges, undumpable, no executable memory that was writable.
//! 8. [`parent`]: dies with the process that started it, if it is a sandbox's. (Steps 5 and 6 would
//!    undo this.)
//! 9. [`landlock`]: no file, no TCP port, no abstract socket, no signal to outsiders.
//! 10. [`seccomp`]: an allow-list of system calls and their arguments. One that isn't on it ends
//!     the process, which first says which it was.
//!
//! A step that fails is an error that names it, and the process must end: nothing here is optional
//! but what a kernel doesn't know (Landlock, memory-deny-write-execute), which seccomp covers.
//! What is allowed to whom is in `docs/jail.md`.
//!
//! A process enters before it has a second thread, since privileges belong to threads.
//!
//! [`foreign`] is for QEMU, which is a dynamic program that isn't ours.

pub mod capabilities;
pub mod descriptors;
mod error;
pub mod foreign;
pub mod hardening;
pub mod identity;
pub mod landlock;
pub mod limits;
pub mod namespaces;
pub mod parent;
pub mod root;
pub mod seccomp;

use std::fs;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::MetadataExt;

use capctl::caps::CapSet;
use nix::sched::CloneFlags;

use self::error::During;
pub use self::error::JailError;
use self::limits::Limits;
use crate::config::JailConfig;

/// What a process may still be and do in its jail.
#[derive(Debug)]
pub struct Jail<'a> {
    /// What the process is called when it breaks its rules, for instance `vmm`.
    pub name: &'static str,
    /// The descriptors it keeps besides standard input, output and error. One of these three that
    /// isn't listed becomes `/dev/null`.
    pub descriptors: &'a [RawFd],
    /// A socket whose other end the starter holds: see [`config`](crate::config). A forbidden
    /// system call is reported on it, and the process dies with its starter. A command that jails
    /// itself has none.
    pub control: Option<BorrowedFd<'a>>,
    /// Who it becomes. Without the privilege to change that, its own user and group.
    pub identity: JailConfig,
    /// Namespaces it leaves; a mount namespace is always among them.
    pub namespaces: CloneFlags,
    /// Resource limits.
    pub limits: Limits,
    /// The system calls it may make.
    pub seccomp: &'a [&'a [seccomp::Rule]],
}

/// Namespaces that cost next to nothing.
pub const CHEAP_NAMESPACES: CloneFlags = CloneFlags::CLONE_NEWNS
    .union(CloneFlags::CLONE_NEWIPC)
    .union(CloneFlags::CLONE_NEWUTS)
    .union(CloneFlags::CLONE_NEWCGROUP);

/// Descriptors that one process of a sandbox may have open: vsock connections and queues.
const DESCRIPTORS: u64 = 4096;
/// Tasks of a sandbox's user on the host: 32 vCPUs, the devices' workers, QEMU's own.
const THREADS: u64 = 256;

impl<'a> Jail<'a> {
    /// The jail of the process that runs a machine of the kvm engine.
    ///
    /// It has no network namespace of its own, which would cost a tenth of the start's budget: it
    /// has no socket but those handed to it, and seccomp refuses `socket`, `connect`, `bind` and
    /// `listen`.
    #[must_use]
    pub fn vmm(
        identity: JailConfig,
        control: Option<BorrowedFd<'a>>,
        descriptors: &'a [RawFd],
    ) -> Self {
        Self {
            name: "vmm",
            descriptors,
            control,
            identity,
            namespaces: CHEAP_NAMESPACES,
            limits: sandbox_limits(),
            seccomp: seccomp::VMM,
        }
    }

    /// The jail of `kiln devices`.
    #[must_use]
    pub fn devices(
        identity: JailConfig,
        control: BorrowedFd<'a>,
        descriptors: &'a [RawFd],
    ) -> Self {
        Self {
            name: "devices",
            descriptors,
            control: Some(control),
            identity,
            namespaces: CHEAP_NAMESPACES.union(CloneFlags::CLONE_NEWNET),
            limits: sandbox_limits(),
            seccomp: seccomp::DEVICES,
        }
    }

    /// Jails the calling process for good.
    ///
    /// Afterwards `/proc` and `/dev` are gone and signal actions can't be changed any more: what
    /// needs them comes before. Every descriptor that isn't listed is closed, whoever owns it.
    ///
    /// # Errors
    /// A step failed; the process must end.
    pub fn enter(&self) -> Result<(), JailError> {
        self.confine()?;
        seccomp::violation::report_to(self.name, self.control);
        seccomp::install(self.seccomp)
    }

    /// [`Jail::enter`] without its last step.
    ///
    /// # Errors
    /// As [`Jail::enter`].
    pub fn confine(&self) -> Result<(), JailError> {
        identity::check(self.identity)?;
        single_thread()?;
        hardening::share_one_heap();
        let JailConfig { uid, gid } = self.identity;
        let privileged = identity::may_change();

        let mut kept = self.descriptors.to_vec();
        kept.extend(self.control.map(|control| control.as_raw_fd()));
        descriptors::keep_only(&kept)?;
        self.limits.set()?;
        if !privileged {
            namespaces::leave_user(uid, gid)?;
        }
        namespaces::leave(self.namespaces.union(CloneFlags::CLONE_NEWNS))?;
        root::detach_from_host()?;
        root::enter_empty()?;
        capabilities::lock(CapSet::empty())?;
        if privileged {
            identity::take_on(self.identity)?;
        }
        capabilities::reduce_to(CapSet::empty())?;
        hardening::apply()?;
        if self.control.is_some() {
            parent::die_with_it(self.control)?;
        }
        landlock::deny_all()?;
        Ok(())
    }
}

/// The limits of every process of a sandbox: the number of tasks is that of the user, who without
/// root has others.
#[must_use]
pub fn sandbox_limits() -> Limits {
    Limits { descriptors: DESCRIPTORS, threads: identity::may_change().then_some(THREADS) }
}

/// Checks that the process has one thread.
///
/// # Errors
/// It has more.
pub fn single_thread() -> Result<(), JailError> {
    // A folder's links are `.`, its name, and one for each folder in it: here one a thread
    // (proc_task_getattr in fs/proc/base.c). To list them costs ten times as much.
    let links = fs::metadata("/proc/self/task").during("look at /proc/self/task")?.nlink();
    match links.saturating_sub(2) {
        1 => Ok(()),
        threads => Err(JailError::Threads(threads)),
    }
}
