//! What a container's first process does to become the one in which its program runs: namespaces,
//! tree, names and kernel parameters. The [rest](super::program) is as for any process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use kiln_protocol::FailurePhase;

use super::Plan;
use super::program::check;
use crate::failure::{During, Failure};
use crate::network;
use crate::process::sysctl;
use crate::rootfs::terminal::Terminal;
use crate::rootfs::{self, Supplies, tree};

/// Makes the namespaces and the tree what the plan says. `joined` is a pidfd of the process whose
/// namespaces are joined. Gives the terminal, if there is to be one.
///
/// # Errors
/// The first thing that fails, by the field of the configuration that asks for it.
pub fn enter(
    plan: &Plan,
    supplies: &Supplies,
    joined: Option<BorrowedFd<'_>>,
) -> Result<Option<Terminal>, Failure> {
    if let Some(joined) = joined {
        join(joined, plan.namespaces.joined_flags())
            .during(FailurePhase::Namespaces, || "join the pod's namespaces")?;
    }
    enter_namespaces(plan)?;
    let proc = (!plan.sysctls.is_empty()).then(|| tree::new_file_system("proc", "proc", &[]));
    let proc = proc.transpose().during(FailurePhase::Process, || "linux.sysctl: procfs")?;
    let terminal = rootfs::enter(&plan.rootfs, supplies, |root| plan.hooks.create(root))?;
    set_names(plan)?;
    if let Some(proc) = proc {
        sysctl::write(&plan.sysctls, proc.as_fd())?;
    }
    Ok(terminal)
}

fn enter_namespaces(plan: &Plan) -> Result<(), Failure> {
    let phase = FailurePhase::Namespaces;
    if plan.namespaces.user.is_some() {
        become_root().during(phase, || "linux.uidMappings")?;
        // Allowed to use its own files in /proc. Nobody else is in the namespace yet.
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0) })
            .during(phase, || "linux.uidMappings")?;
    }
    // SAFETY: the process has one thread and shares nothing with its parent.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })
        .during(phase, || "linux.namespaces (cgroup)")?;
    if let Some(offsets) = &plan.namespaces.time {
        enter_time_namespace(offsets).during(phase, || "linux.timeOffsets")?;
    }
    if plan.namespaces.has_new_network() {
        network::bring_loopback_up().during(phase, || "linux.namespaces (network): lo")?;
    }
    Ok(())
}

/// Joins the namespaces of a container's first process.
///
/// # Errors
/// As setns(2), or that it has ended.
pub fn join(first: BorrowedFd<'_>, flags: libc::c_int) -> io::Result<()> {
    // SAFETY: the descriptor is open; the process has one thread and shares nothing.
    match check(unsafe { libc::setns(first.as_raw_fd(), flags) }) {
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
            Err(io::Error::other("its first process has ended"))
        }
        joined => joined,
    }
}

/// Root of the user namespace that the process is in.
pub fn become_root() -> io::Result<()> {
    // SAFETY: plain numbers, and an empty list of groups without a pointer.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        check(libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        check(libc::syscall(libc::SYS_setresuid, 0, 0, 0))
    }
}

/// Offsets can be written as long as no process is in the namespace.
fn enter_time_namespace(offsets: &str) -> io::Result<()> {
    // SAFETY: the process has one thread and shares nothing with its parent.
    check(unsafe { libc::unshare(libc::CLONE_NEWTIME) })?;
    if !offsets.is_empty() {
        std::fs::write("/proc/self/timens_offsets", offsets)?;
    }
    let namespace = std::fs::File::open("/proc/self/ns/time_for_children")?;
    // SAFETY: the descriptor is open.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWTIME) })
}

fn set_names(plan: &Plan) -> Result<(), Failure> {
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes())
            .during(FailurePhase::Namespaces, || format!("hostname ({name:?})"))?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes())
            .during(FailurePhase::Namespaces, || format!("domainname ({name:?})"))?;
    }
    Ok(())
}
