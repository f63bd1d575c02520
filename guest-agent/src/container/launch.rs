//! Starting a container's first process, and what the agent does for it from outside.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;

use kiln_protocol::FailurePhase;

use super::channel::{Channel, Command};
use super::{Plan, init};
use crate::cgroup::Cgroup;
use crate::failure::{During, Failure};
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

/// Starts the container's first process and has it set itself up; it reports over the channel.
///
/// The calling process has one thread, or its other threads hold no locks.
///
/// # Errors
/// What keeps the process from being started, by phase. The process is dead then, but not reaped.
pub fn launch(
    plan: &Plan,
    supplies: Supplies,
    streams: StandardStreams,
    cgroup: &Cgroup,
) -> Result<Launched, Failure> {
    cgroup.limit(&plan.limits)?;
    let (channel, of_process) =
        Channel::pair().during(FailurePhase::Process, || "set-up channel")?;
    // SAFETY: the child gets a copy of the whole address space, like a child of fork(2), and never
    // returns from this branch.
    let pid = unsafe { clone_process(plan.namespaces.clone_flags()) }
        .during(FailurePhase::Namespaces, || "linux.namespaces")?;
    if pid == 0 {
        drop(channel);
        init::run(plan, &supplies, streams, &of_process);
    }
    drop(of_process);
    let launched = Launched { pid, channel };
    prepare(plan, &launched, cgroup).inspect_err(|_| {
        // SAFETY: plain numbers; the process is this one's unreaped child.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    })?;
    Ok(launched)
}

/// Applies what the process may not apply to itself, once it has reported that it is ready.
///
/// # Errors
/// A limit or priority that the kernel doesn't take, by field.
pub fn constrain(plan: &Plan, pid: libc::pid_t) -> Result<(), Failure> {
    let process = &plan.process;
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

fn prepare(plan: &Plan, launched: &Launched, cgroup: &Cgroup) -> Result<(), Failure> {
    let pid = launched.pid;
    cgroup.add(pid).during(FailurePhase::Cgroups, || "join the container's cgroup")?;
    let write = |file: &str, value: &str| fs::write(format!("/proc/{pid}/{file}"), value);
    write("oom_score_adj", &plan.process.oom_score_adj.to_string())
        .during(FailurePhase::Process, || "process.oomScoreAdj")?;
    if let Some(user) = &plan.namespaces.user {
        write("uid_map", &user.uid_map())
            .during(FailurePhase::Namespaces, || "linux.uidMappings")?;
        write("gid_map", &user.gid_map())
            .during(FailurePhase::Namespaces, || "linux.gidMappings")?;
        let (uid, gid) = user.outside((0, 0));
        cgroup.delegate(uid, gid).during(FailurePhase::Cgroups, || "delegate the cgroup")?;
    }
    launched
        .channel
        .command(Command::Prepare)
        .during(FailurePhase::Process, || "the container's first process is gone")
}

/// clone3(2) without shared memory: 0 in the child.
///
/// # Safety
/// As fork(2) in a process with several threads: the child may only use what no other thread of the
/// parent was changing.
unsafe fn clone_process(flags: u64) -> io::Result<libc::pid_t> {
    let arguments = libc::clone_args {
        flags,
        exit_signal: libc::SIGCHLD as u64,
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
