//! A further process in a container that runs: an exec.
//!
//! It takes two steps, as entering a PID namespace is for children only. A child of the agent, outside
//! of the container, lets go of everything that is the agent's and joins the namespaces of the
//! container's first process; the child that it then has is a child of the agent's
//! (`CLONE_PARENT`), and the first that the container's other processes can see. From there on it
//! [becomes its program](super::program) like any process.
//!
//! The namespaces are those that the first process is in now, as under runc.

use std::convert::Infallible;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use kiln_protocol::FailurePhase;
use rustix::fs::{Mode, OFlags};

use super::channel::{Channel, Report};
use super::launch::{StandardStreams, clone_process};
use super::program::{self, Program};
use super::{Plan, init};
use crate::failure::{During, Failure};
use crate::process::ProcessPlan;
use crate::rootfs::terminal::{self, Terminal};

/// An exec.
#[derive(Debug, Clone, Copy)]
pub struct Joining<'a> {
    /// The container's plan.
    pub container: &'a Plan,
    /// A pidfd of the container's first process.
    pub first: BorrowedFd<'a>,
    /// What the process is to be.
    pub process: &'a ProcessPlan,
}

/// Joins the container, has the process born there, and reports its id.
///
/// # Errors
/// What keeps the process from being born; and in the process itself, as
/// [`program::become_program`].
pub fn run(
    joining: Joining<'_>,
    streams: StandardStreams,
    channel: &Channel,
) -> Result<Infallible, Failure> {
    let phase = FailurePhase::Namespaces;
    let ends = streams.ends.iter().flatten().map(AsRawFd::as_raw_fd);
    let others = [channel.socket().as_raw_fd(), joining.first.as_raw_fd()];
    let needed: Vec<RawFd> = ends.chain(others).collect();
    program::withdraw(&needed).during(phase, || "close descriptors")?;
    let Joining { container, process, first } = joining;
    init::join(first, container.namespaces.join_flags()).during(phase, || "join the container")?;
    be_born(0, channel)?;
    let program = Program { process, seccomp: container.seccomp.as_ref(), hooks: None };
    program::become_program(program, streams, channel, || enter(joining))
}

/// Has a process that has joined a PID namespace go on in there, as a child of the agent's, with further
/// namespaces of its own by `flags`. The process that calls this reports its id and ends.
///
/// # Errors
/// As clone3(2): among others that the namespace's first process has ended.
pub fn be_born(flags: u64, channel: &Channel) -> Result<(), Failure> {
    // SAFETY: the process has one thread.
    let pid = unsafe { clone_process(libc::CLONE_PARENT as u64 | flags, 0) };
    let pid = pid.during(FailurePhase::Namespaces, || "start a process in the container")?;
    if pid == 0 {
        return Ok(());
    }
    channel
        .report(&Report::Born { pid }, None)
        .during(FailurePhase::Process, || "set-up channel")?;
    program::end(0)
}

/// Joining the namespaces has made the container's root the process's.
fn enter(Joining { container, process, .. }: Joining<'_>) -> Result<Option<Terminal>, Failure> {
    if container.namespaces.user.is_some() {
        init::become_root().during(FailurePhase::Namespaces, || "linux.uidMappings")?;
    }
    let Some(size) = process.terminal else { return Ok(None) };
    let allocate = || {
        let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        terminal::allocate(std::os::fd::AsFd::as_fd(&root), size)
    };
    allocate().map(Some).during(FailurePhase::Stdio, || "process.terminal: /dev/pts")
}
