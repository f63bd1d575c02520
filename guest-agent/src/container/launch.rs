//! Starting a container's processes, and what the agent does for them from outside.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use kiln_protocol::FailurePhase;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::channel::{Channel, Command, Report};
use super::join::{self, Joining};
use super::namespaces::UserMappings;
use super::program::{self, Program};
use super::{Plan, init};
use crate::cgroup::Cgroup;
use crate::failure::{During, Failure};
use crate::process::ProcessPlan;
use crate::rootfs::Supplies;

/// The process's ends of its stdio pipes. What is absent is `/dev/null`, or the terminal.
#[derive(Debug, Default)]
pub struct StandardStreams {
    /// Descriptors 0, 1 and 2.
    pub ends: [Option<OwnedFd>; 3],
}

/// A process on its way to its program.
#[derive(Debug)]
pub struct Launched {
    /// Its id, in the agent's PID namespace.
    pub pid: libc::pid_t,
    /// The channel to it.
    pub channel: Channel,
}

/// Pidfds of the processes whose namespaces a container joins.
#[derive(Debug, Default)]
pub struct Others {
    /// The first process of the pod's sandbox.
    pub sandbox: Option<OwnedFd>,
    /// That of the container whose PID namespace it is.
    pub processes: Option<OwnedFd>,
}

/// Starts the container's first process and has it set itself up; it reports over the channel. `others`
/// are what the plan joins.
///
/// The calling process has one thread, or its other threads hold no locks.
///
/// # Errors
/// What keeps the process from being started, by phase. The process is dead then, but not reaped.
pub fn launch(
    plan: &Plan,
    supplies: Supplies,
    others: Others,
    streams: StandardStreams,
    cgroup: &Cgroup,
) -> Result<Launched, Failure> {
    cgroup.limit(&plan.limits)?;
    let devices = || "linux.resources.devices";
    cgroup.restrict_devices(&plan.devices).during(FailurePhase::Cgroups, devices)?;
    let (channel, of_process) = channel()?;
    let made = plan.namespaces.clone_flags();
    let at_once = if others.processes.is_some() { 0 } else { made };
    // SAFETY: the child gets a copy of the whole address space, like a child of fork(2), and never
    // returns from this branch.
    let pid = unsafe { clone_process(at_once, libc::SIGCHLD) }
        .during(FailurePhase::Namespaces, || "linux.namespaces")?;
    if pid == 0 {
        drop(channel);
        let (seccomp, hooks) = (plan.seccomp.as_ref(), Some(&plan.hooks));
        let program = Program { process: &plan.process, seccomp, hooks };
        program::run(&of_process, || {
            if let Some(processes) = &others.processes {
                withdraw(&streams, &supplies, &others, &of_process)?;
                init::join(processes.as_fd(), libc::CLONE_NEWPID)
                    .during(FailurePhase::Namespaces, || "join the PID namespace")?;
                join::be_born(made, &of_process)?;
            }
            let sandbox = others.sandbox.as_ref().map(AsFd::as_fd);
            let enter = || init::enter(plan, &supplies, sandbox);
            program::become_program(program, streams, &of_process, enter)
        });
    }
    drop(of_process);
    let pid = match others.processes {
        Some(_) => born(pid, &channel)?,
        None => pid,
    };
    let launched = Launched { pid, channel };
    or_kill(launched, |launched| {
        cgroup.add(pid).during(FailurePhase::Cgroups, || CGROUP)?;
        if let Some(user) = &plan.namespaces.user {
            map_ids(user, pid, cgroup)?;
        }
        release(&plan.process, launched)
    })
}

/// Starts a further process in a container whose first process is `first`; as [`launch`].
///
/// # Errors
/// As [`launch`], and that the first process has ended.
pub fn join(
    container: &Plan,
    first: libc::pid_t,
    process: &ProcessPlan,
    streams: StandardStreams,
    cgroup: &Cgroup,
) -> Result<Launched, Failure> {
    let descriptor =
        open_process(first).during(FailurePhase::Namespaces, || "the first process")?;
    let (channel, of_process) = channel()?;
    // SAFETY: as in `launch`.
    let joiner = unsafe { clone_process(0, libc::SIGCHLD) }
        .during(FailurePhase::Process, || "start a process")?;
    if joiner == 0 {
        drop(channel);
        let joining = Joining { container, first: descriptor.as_fd(), process };
        program::run(&of_process, || join::run(joining, streams, &of_process));
    }
    drop(of_process);
    let pid = born(joiner, &channel)?;
    or_kill(Launched { pid, channel }, |launched| {
        cgroup.add_beside(pid, first).during(FailurePhase::Cgroups, || CGROUP)?;
        release(process, launched)
    })
}

/// The process that `joiner` has had [born](join::be_born) elsewhere.
fn born(joiner: libc::pid_t, channel: &Channel) -> Result<libc::pid_t, Failure> {
    // It ends within a few system calls, none of which waits for anything of the container's.
    // SAFETY: a child of this process, not yet reaped; its status is not asked for.
    while unsafe { libc::waitpid(joiner, std::ptr::null_mut(), 0) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
    match channel.take_report() {
        Ok(Some((Report::Born { pid }, _))) => Ok(pid),
        Ok(Some((Report::Failed(failure), _))) => Err(failure),
        _ => {
            let why = "the process ended on its way into the container";
            Err(Failure::new(FailurePhase::Namespaces, why))
        }
    }
}

/// Lets go of all that isn't the container's, before processes of another can see the calling one.
fn withdraw(
    streams: &StandardStreams,
    supplies: &Supplies,
    others: &Others,
    channel: &Channel,
) -> Result<(), Failure> {
    let ends = streams.ends.iter().flatten();
    let files = std::iter::once(&supplies.rootfs).chain(supplies.binds.values());
    let processes = others.sandbox.iter().chain(&others.processes);
    let needed = ends.chain(files).chain(processes).chain([channel.socket()]);
    let needed: Vec<_> = needed.map(AsRawFd::as_raw_fd).collect();
    program::withdraw(&needed).during(FailurePhase::Namespaces, || "close descriptors")
}

/// A pidfd of a child that is not reaped yet.
///
/// # Errors
/// As pidfd_open(2).
pub fn open_process(pid: libc::pid_t) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

fn channel() -> Result<(Channel, Channel), Failure> {
    Channel::pair().during(FailurePhase::Process, || "set-up channel")
}

/// Applies what the process may not apply to itself, once it has reported that it is ready.
///
/// # Errors
/// A limit or priority that the kernel doesn't take, by field.
pub fn constrain(process: &ProcessPlan, pid: libc::pid_t) -> Result<(), Failure> {
    for limit in &process.rlimits {
        let field = || format!("process.rlimits ({})", limit.name());
        limit.apply(pid).during(FailurePhase::Process, field)?;
    }
    if let Some(scheduler) = &process.scheduler {
        scheduler.apply(pid).during(FailurePhase::Process, || "process.scheduler")?;
    }
    if let Some(priority) = process.io_priority {
        crate::process::scheduling::set_io_priority(pid, priority)
            .during(FailurePhase::Process, || "process.ioPriority")?;
    }
    Ok(())
}

const CGROUP: &str = "join the container's cgroup";

/// Kills a process for which the agent can't do its part.
fn or_kill(
    launched: Launched,
    prepare: impl FnOnce(&Launched) -> Result<(), Failure>,
) -> Result<Launched, Failure> {
    prepare(&launched).inspect_err(|_| {
        // SAFETY: plain numbers; the process is this one's unreaped child.
        unsafe { libc::kill(launched.pid, libc::SIGKILL) };
    })?;
    Ok(launched)
}

/// Gives the user namespace of a first process its mappings, and its root the cgroup.
fn map_ids(user: &UserMappings, pid: libc::pid_t, cgroup: &Cgroup) -> Result<(), Failure> {
    for (file, field, map) in [
        ("uid_map", "linux.uidMappings", user.uid_map()),
        ("gid_map", "linux.gidMappings", user.gid_map()),
    ] {
        fs::write(format!("/proc/{pid}/{file}"), map).during(FailurePhase::Namespaces, || field)?;
    }
    let (uid, gid) = user.outside((0, 0));
    cgroup.delegate(uid, gid).during(FailurePhase::Cgroups, || "delegate the cgroup")
}

/// Has a process go on that is where it belongs.
fn release(process: &ProcessPlan, launched: &Launched) -> Result<(), Failure> {
    let score = process.oom_score_adj.to_string();
    fs::write(format!("/proc/{}/oom_score_adj", launched.pid), score)
        .during(FailurePhase::Process, || "process.oomScoreAdj")?;
    let prepare = launched.channel.command(Command::Prepare);
    prepare.during(FailurePhase::Process, || "the process is gone")
}

/// clone3(2) without shared memory: 0 in the child. The parent gets `exit_signal` at its end.
///
/// # Safety
/// As fork(2) in a process with several threads: the child may only use what no other thread of the
/// parent was changing.
pub unsafe fn clone_process(flags: u64, exit_signal: libc::c_int) -> io::Result<libc::pid_t> {
    let arguments = libc::clone_args {
        flags,
        exit_signal: exit_signal as u64,
        pidfd: 0,
        child_tid: 0,
        parent_tid: 0,
        stack: 0,
        stack_size: 0,
        tls: 0,
        set_tid: 0,
        set_tid_size: 0,
        cgroup: 0,
    };
    // SAFETY: the arguments are a `struct clone_args` of the size given; no stack means that the
    // child continues on a copy of this one.
    let pid =
        unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of_val(&arguments)) };
    if pid < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(pid as libc::pid_t)
}
