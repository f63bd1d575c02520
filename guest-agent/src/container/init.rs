//! What a container's first process does between its birth and its program.
//!
//! # Order
//! Privileges shrink on the way. Tree, names and kernel parameters need the namespaces' full
//! capabilities; then come stdio, user and capabilities; the working directory and the program are
//! looked up as the user that will use them. Then the process reports that it is ready and waits. What
//! is left afterwards is the seccomp filter, one capset(2) where the filter could only be installed
//! with a capability that the program must not have, and execve(2): the calls that a profile must
//! allow, as under runc.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use capctl::caps::Cap;
use kiln_protocol::FailurePhase;
use rustix::fs::{OFlags, Uid};

use super::Plan;
use super::channel::{Channel, Command, Report};
use super::launch::StandardStreams;
use crate::failure::{During, Failure};
use crate::guest::network;
use crate::process::{executable, sysctl};
use crate::rootfs::devices::{self, Node};
use crate::rootfs::terminal::Terminal;
use crate::rootfs::{self, Supplies, tree};

/// Longest message that is reported, in bytes.
const MAX_MESSAGE: usize = 4096;

/// Sets the process up, waits for the word to execute the program, and executes it.
pub fn run(plan: &Plan, supplies: &Supplies, streams: StandardStreams, channel: &Channel) -> ! {
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let Err(mut failure) = become_program(plan, supplies, streams, channel);
        if let Some((end, _)) = failure.message.char_indices().find(|(at, _)| *at >= MAX_MESSAGE) {
            failure.message.truncate(end);
        }
        let status = failure.exit_code;
        // If the agent is gone, nobody is left to be told.
        let _ = channel.report(&Report::Failed(failure), None);
        status
    }));
    // SAFETY: ends the process at once, without running what the agent's copy would run at exit.
    unsafe { libc::_exit(ended.unwrap_or(1).into()) }
}

fn become_program(
    plan: &Plan,
    supplies: &Supplies,
    streams: StandardStreams,
    channel: &Channel,
) -> Result<Infallible, Failure> {
    channel.await_command(Command::Prepare).during(FailurePhase::Process, || "set-up channel")?;
    reset_signals().during(FailurePhase::Process, || "reset signals")?;
    enter_namespaces(plan)?;
    let proc = (!plan.sysctls.is_empty()).then(|| tree::new_file_system("proc", "proc", &[]));
    let proc = proc.transpose().during(FailurePhase::Process, || "linux.sysctl: procfs")?;
    let terminal = rootfs::enter(&plan.rootfs, supplies)?;
    set_names(plan)?;
    if let Some(proc) = proc {
        sysctl::write(&plan.sysctls, proc.as_fd())?;
    }
    if let Some(personality) = plan.process.personality {
        // SAFETY: a plain number.
        let result = unsafe { libc::personality(personality) };
        check(result).during(FailurePhase::Process, || "linux.personality")?;
    }
    let master = attach_streams(plan, streams, terminal)
        .during(FailurePhase::Stdio, || "standard streams")?;
    let kept = assume_identity(plan)?;
    let environment = environment(plan);
    let program = executable::find(&plan.process.args[0], &plan.process.env)?;
    channel
        .report(&Report::Ready, master.as_ref())
        .during(FailurePhase::Process, || "set-up channel")?;
    drop(master);
    channel.await_command(Command::Execute).during(FailurePhase::Process, || "set-up channel")?;
    execute(plan, kept, &program, &environment)
}

/// The program starts with no signal blocked or ignored, whatever the agent does about them.
fn reset_signals() -> io::Result<()> {
    /// `struct sigaction` of the kernel, of which all zeroes is the default disposition.
    #[repr(C)]
    struct KernelAction([u64; 4]);
    const SET_SIZE: usize = size_of::<u64>();
    for signal in 1..=64 {
        let default = KernelAction([0; 4]);
        let none = std::ptr::null_mut::<KernelAction>();
        // SAFETY: the new action lives for the call and no old one is asked for. Two signals cannot
        // be changed, which is an error to pass over.
        unsafe {
            libc::syscall(libc::SYS_rt_sigaction, signal, &raw const default, none, SET_SIZE);
        }
    }
    // SAFETY: sigemptyset initialises the set before it is used.
    let result = unsafe {
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut())
    };
    check(result)
}

fn enter_namespaces(plan: &Plan) -> Result<(), Failure> {
    let phase = FailurePhase::Namespaces;
    if plan.namespaces.user.is_some() {
        become_root().during(phase, || "linux.uidMappings")?;
    }
    rustix::process::setsid().during(phase, || "setsid")?;
    // SAFETY: the process has one thread and shares nothing with its parent.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) })
        .during(phase, || "linux.namespaces (cgroup)")?;
    if let Some(offsets) = &plan.namespaces.time {
        enter_time_namespace(offsets).during(phase, || "linux.timeOffsets")?;
    }
    if plan.namespaces.network {
        network::bring_loopback_up().during(phase, || "linux.namespaces (network): lo")?;
    }
    Ok(())
}

/// Root of the new user namespace, and allowed to use its own files in /proc.
fn become_root() -> io::Result<()> {
    // SAFETY: plain numbers, and an empty list of groups without a pointer.
    unsafe {
        check(libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()))?;
        check(libc::syscall(libc::SYS_setresgid, 0, 0, 0))?;
        check(libc::syscall(libc::SYS_setresuid, 0, 0, 0))?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 1, 0, 0, 0))
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

/// Makes descriptors 0, 1 and 2 what they are to be. Gives the terminal's master.
fn attach_streams(
    plan: &Plan,
    streams: StandardStreams,
    terminal: Option<Terminal>,
) -> io::Result<Option<OwnedFd>> {
    if let Some(Terminal { master, slave }) = terminal {
        // SAFETY: the ioctl takes a number and no pointer.
        check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        // The group stays the one that devpts gives to terminals.
        rustix::fs::fchown(&slave, Some(Uid::from_raw(plan.process.identity.uid)), None)?;
        for target in 0..3 {
            duplicate(&slave, target)?;
        }
        return Ok(Some(master));
    }
    for (target, end) in (0..).zip(streams.ends) {
        match end {
            Some(end) => duplicate(&end, target)?,
            None => duplicate(&null()?, target)?,
        }
    }
    Ok(None)
}

/// The container's own null device, after a look at what it is.
fn null() -> io::Result<OwnedFd> {
    let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, rustix::fs::Mode::empty())?;
    let path = Path::new("/dev/null");
    devices::open_checked(root.as_fd(), path, Node::Character(1, 3), OFlags::RDWR)
}

fn duplicate(source: &OwnedFd, target: libc::c_int) -> io::Result<()> {
    // SAFETY: dup2(2) of an open descriptor; nothing in this process owns 0, 1 and 2.
    check(unsafe { libc::dup2(source.as_raw_fd(), target) })
}

/// Becomes the user with its capabilities. Gives the capability that is kept for the seccomp filter.
fn assume_identity(plan: &Plan) -> Result<Option<Cap>, Failure> {
    let phase = FailurePhase::Process;
    let process = &plan.process;
    // A directory that only root may enter can still be the working directory, as under runc.
    let entered = rustix::process::chdir(&process.cwd);
    let cwd = || format!("process.cwd ({})", process.cwd.display());
    if !matches!(entered, Ok(()) | Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM)) {
        entered.during(phase, cwd)?;
    }
    process.capabilities.limit_bounding().during(phase, || "process.capabilities.bounding")?;
    process.identity.assume().during(phase, || "process.user")?;
    let needs_capability = plan.seccomp.is_some() && !process.no_new_privileges;
    let kept = needs_capability.then_some(Cap::SYS_ADMIN);
    process.capabilities.apply(kept).during(phase, || "process.capabilities")?;
    if entered.is_err() {
        rustix::process::chdir(&process.cwd).during(phase, cwd)?;
    }
    // The kernel answers with "(unreachable)" for a directory outside the root.
    let current = rustix::process::getcwd(Vec::new()).during(phase, cwd)?;
    if !current.to_bytes().starts_with(b"/") {
        return Err(Failure::new(phase, format!("{}: is outside the container", cwd())));
    }
    if process.no_new_privileges {
        // SAFETY: plain numbers.
        check(unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) })
            .during(phase, || "process.noNewPrivileges")?;
    }
    Ok(kept)
}

fn environment(plan: &Plan) -> Vec<String> {
    let mut environment = plan.process.env.clone();
    if !environment.iter().any(|variable| variable.starts_with("HOME=")) {
        let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
        environment.push(format!("HOME={}", executable::home(&passwd, plan.process.identity.uid)));
    }
    environment
}

fn execute(
    plan: &Plan,
    kept: Option<Cap>,
    program: &Path,
    environment: &[String],
) -> Result<Infallible, Failure> {
    // Nothing of the agent's reaches the program, whatever opened it.
    // SAFETY: marks descriptors; those that this process still uses work on until execve(2).
    check(unsafe { libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) })
        .during(FailurePhase::Process, || "close descriptors")?;
    let strings = |texts: &[String]| -> Result<Vec<CString>, Failure> {
        let texts = texts.iter().map(|text| CString::new(text.as_bytes()));
        texts.collect::<Result<_, _>>().during(FailurePhase::Exec, || "process.args, process.env")
    };
    let (args, environment) = (strings(&plan.process.args)?, strings(environment)?);
    let path = CString::new(program.as_os_str().as_encoded_bytes())
        .during(FailurePhase::Exec, || "process.args")?;
    if let Some(filter) = &plan.seccomp {
        filter.install().during(FailurePhase::Process, || "linux.seccomp")?;
    }
    if kept.is_some() {
        let finished = plan.process.capabilities.finish();
        finished.during(FailurePhase::Process, || "process.capabilities")?;
    }
    match nix::unistd::execve(&path, &args, &environment) {
        Ok(never) => match never {},
        Err(errno) => Err(executable::exec_failure(program, errno.into())),
    }
}

fn check(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
