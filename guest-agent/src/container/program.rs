//! From a process inside a container's namespaces to the program that it is to be: the same for the
//! container's first process and for each exec.
//!
//! # Order
//! Privileges shrink on the way. The set-up of files and names needs the namespaces' full
//! capabilities; then come stdio, user and capabilities; the working directory and the program are
//! looked up as the user that will use them. Then the process has given up all that is the agent's,
//! reports that it is ready and waits. What is left afterwards is the seccomp filter, one capset(2)
//! where the filter could only be installed with a capability that the program must not have, and
//! execve(2): the calls that a profile must allow, as under runc.
//!
//! # Other processes of the container
//! They may see this one while it is still the agent's code. So from the moment at which they may, it
//! is not dumpable, which keeps what has no `CAP_SYS_PTRACE` in the guest from its memory and its
//! descriptors, and none of these is the agent's but the [`Channel`].

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::Path;

use capctl::caps::Cap;
use kiln_protocol::FailurePhase;
use rustix::fs::{Mode, OFlags, Uid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use super::channel::{Channel, Command, Report};
use super::hooks::Hooks;
use super::launch::StandardStreams;
use crate::failure::{During, Failure, clip};
use crate::process::{ProcessPlan, executable};
use crate::rootfs::devices::{self, Node};
use crate::rootfs::terminal::Terminal;
use crate::seccomp::Filter;

/// Longest message that is reported, in bytes.
const MAX_MESSAGE: usize = 4096;

/// The program of a process.
#[derive(Debug, Clone, Copy)]
pub struct Program<'a> {
    /// What the process is to be.
    pub process: &'a ProcessPlan,
    /// The container's filter.
    pub seccomp: Option<&'a Filter>,
    /// Hooks to run before it.
    pub hooks: Option<&'a Hooks>,
}

/// Runs what makes up the process, reports its failure to the agent if there is one, and ends.
pub fn run(channel: &Channel, steps: impl FnOnce() -> Result<Infallible, Failure>) -> ! {
    let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let Err(mut failure) = steps();
        failure.message = clip(&failure.message, MAX_MESSAGE).to_owned();
        let status = failure.exit_code;
        // If the agent is gone, nobody is left to be told.
        let _ = channel.report(&Report::Failed(failure), None);
        status
    }));
    end(ended.unwrap_or(1))
}

/// Ends the calling process at once, without running what the agent's copy would run at exit.
pub fn end(status: u8) -> ! {
    // SAFETY: takes a number and doesn't return.
    unsafe { libc::_exit(status.into()) }
}

/// Waits until the agent has done its part, sets the process up, waits for the word to execute the
/// program, and executes it. `enter` brings the process to its files and gives its terminal.
///
/// # Errors
/// The first thing that fails, by its field.
pub fn become_program(
    program: Program<'_>,
    streams: StandardStreams,
    channel: &Channel,
    enter: impl FnOnce() -> Result<Option<Terminal>, Failure>,
) -> Result<Infallible, Failure> {
    let phase = FailurePhase::Process;
    channel.await_command(Command::Prepare).during(phase, || "set-up channel")?;
    reset_signals().during(phase, || "reset signals")?;
    limit_descriptors().during(phase, || "limit descriptors")?;
    rustix::process::setsid().during(phase, || "setsid")?;
    let terminal = enter()?;
    let process = program.process;
    if let Some(personality) = process.personality {
        // SAFETY: a plain number.
        let result = unsafe { libc::personality(personality) };
        check(result).during(phase, || "linux.personality")?;
    }
    let master = attach_streams(process, streams, terminal)
        .during(FailurePhase::Stdio, || "standard streams")?;
    let kept = assume_identity(program)?;
    let environment = environment(process);
    let path = executable::find(&process.args[0], &process.env)?;
    // Nothing of the agent's reaches the program, whatever opened it.
    let channel_and_master = [Some(channel.socket()), master.as_ref()];
    let needed: Vec<RawFd> =
        channel_and_master.into_iter().flatten().map(AsRawFd::as_raw_fd).collect();
    withdraw(&needed).during(phase, || "close descriptors")?;
    channel.report(&Report::Ready, master.as_ref()).during(phase, || "set-up channel")?;
    drop(master);
    channel.await_command(Command::Execute).during(phase, || "set-up channel")?;
    execute(program, kept, &path, &environment)
}

/// Closes every descriptor above 2 but those that are `needed`, whoever owns it, and makes the calling
/// process not dumpable. What owned the others must not be used or dropped any more.
///
/// # Errors
/// As close_range(2).
pub fn withdraw(needed: &[RawFd]) -> io::Result<()> {
    let mut needed = needed.to_vec();
    needed.sort_unstable();
    let mut first: libc::c_uint = 3;
    for descriptor in needed.into_iter().filter_map(|raw| libc::c_uint::try_from(raw).ok()) {
        if descriptor > first {
            // SAFETY: the process is on its way to its program and uses only what is needed.
            check(unsafe { libc::close_range(first, descriptor - 1, 0) })?;
        }
        first = first.max(descriptor + 1);
    }
    // SAFETY: as above; and prctl(2) takes plain numbers.
    unsafe {
        check(libc::close_range(first, libc::c_uint::MAX, 0))?;
        check(libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
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

/// Descriptors that a program may open at first, where its configuration has no limit. It may raise
/// that to what the agent may open.
const DESCRIPTORS: u64 = 1024;

fn limit_descriptors() -> io::Result<()> {
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    Ok(setrlimit(Resource::Nofile, Rlimit { current: Some(current), ..limit })?)
}

/// Makes descriptors 0, 1 and 2 what they are to be. Gives the terminal's master.
fn attach_streams(
    process: &ProcessPlan,
    streams: StandardStreams,
    terminal: Option<Terminal>,
) -> io::Result<Option<OwnedFd>> {
    if let Some(Terminal { master, slave }) = terminal {
        // SAFETY: the ioctl takes a number and no pointer.
        check(unsafe { libc::ioctl(slave.as_raw_fd(), libc::TIOCSCTTY, 0) })?;
        // The group stays the one that devpts gives to terminals.
        rustix::fs::fchown(&slave, Some(Uid::from_raw(process.identity.uid)), None)?;
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
    let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let path = Path::new("/dev/null");
    devices::open_checked(root.as_fd(), path, Node::Character(1, 3), OFlags::RDWR)
}

/// Makes a descriptor below 3 a copy of another.
///
/// # Errors
/// As dup2(2).
pub fn duplicate(source: impl AsFd, target: libc::c_int) -> io::Result<()> {
    // SAFETY: dup2(2) of an open descriptor; nothing in this process owns 0, 1 and 2.
    check(unsafe { libc::dup2(source.as_fd().as_raw_fd(), target) })
}

/// Becomes the user with its capabilities. Gives the capability that is kept for the seccomp filter.
fn assume_identity(program: Program<'_>) -> Result<Option<Cap>, Failure> {
    let phase = FailurePhase::Process;
    let process = program.process;
    // A directory that only root may enter can still be the working directory, as under runc.
    let entered = rustix::process::chdir(&process.cwd);
    let cwd = || format!("process.cwd ({})", process.cwd.display());
    if !matches!(entered, Ok(()) | Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM)) {
        entered.during(phase, cwd)?;
    }
    process.capabilities.limit_bounding().during(phase, || "process.capabilities.bounding")?;
    process.identity.assume().during(phase, || "process.user")?;
    let needs_capability = program.seccomp.is_some() && !process.no_new_privileges;
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

fn environment(process: &ProcessPlan) -> Vec<String> {
    let mut environment = process.env.clone();
    if !environment.iter().any(|variable| variable.starts_with("HOME=")) {
        let passwd = std::fs::read("/etc/passwd").unwrap_or_default();
        environment.push(format!("HOME={}", executable::home(&passwd, process.identity.uid)));
    }
    environment
}

fn execute(
    program: Program<'_>,
    kept: Option<Cap>,
    path: &Path,
    environment: &[String],
) -> Result<Infallible, Failure> {
    let process = program.process;
    let field = || "process.args, process.env";
    let args = c_strings(&process.args).during(FailurePhase::Exec, field)?;
    let environment = c_strings(environment).during(FailurePhase::Exec, field)?;
    let program_path = c_string(path).during(FailurePhase::Exec, || "process.args")?;
    if let Some(hooks) = program.hooks {
        hooks.start(|| confine(program, kept).map_err(io::Error::other))?;
    }
    confine(program, kept)?;
    match nix::unistd::execve(&program_path, &args, &environment) {
        Ok(never) => match never {},
        Err(errno) => Err(executable::exec_failure(path, errno.into())),
    }
}

/// Installs the filter and drops the capability that was kept for it.
fn confine(program: Program<'_>, kept: Option<Cap>) -> Result<(), Failure> {
    if let Some(filter) = program.seccomp {
        filter.install().during(FailurePhase::Process, || "linux.seccomp")?;
    }
    if kept.is_some() {
        let finished = program.process.capabilities.finish();
        finished.during(FailurePhase::Process, || "process.capabilities")?;
    }
    Ok(())
}

/// Texts for execve(2).
///
/// # Errors
/// `InvalidInput` for a null byte.
pub fn c_strings(texts: &[String]) -> io::Result<Vec<CString>> {
    Ok(texts.iter().map(|text| CString::new(text.as_bytes())).collect::<Result<_, _>>()?)
}

/// As [`c_strings`], of a path.
///
/// # Errors
/// As [`c_strings`].
pub fn c_string(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_encoded_bytes())?)
}

/// The error of a system call that gives a negative number for one.
pub fn check(result: impl Into<i64>) -> io::Result<()> {
    if result.into() < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
