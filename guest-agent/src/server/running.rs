//! A container that has been launched, until its end.

use std::os::fd::OwnedFd;

use kiln_protocol::{ExitStatus, StreamToken};

use crate::cgroup::Cgroup;
use crate::container::Plan;
use crate::container::channel::Channel;
use crate::rootfs::devices::DeviceStore;

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Setting itself up.
    Creating,
    /// Waiting for the word to execute its program.
    Created,
    /// Told to execute.
    Starting,
    /// Its program has been executed.
    Running,
}

/// A container. Dropping it kills what is left of it.
#[derive(Debug)]
pub struct Running {
    /// Its first process, not yet reaped.
    pub pid: libc::pid_t,
    /// How far it is.
    pub state: State,
    /// The channel to its first process, until that executes its program.
    pub channel: Option<Channel>,
    /// Token of the channel in the poller.
    pub channel_token: u64,
    /// What it was made from.
    pub plan: Plan,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// Its terminal's master, for changes of size.
    pub terminal: Option<OwnedFd>,
    /// All its streams.
    pub tokens: Vec<StreamToken>,
    /// Its device nodes: they go when it goes.
    pub _devices: DeviceStore,
}

/// The end of a process, from the status that waitpid(2) gives.
pub fn exit_status(status: libc::c_int) -> ExitStatus {
    if libc::WIFSIGNALED(status) {
        // Signals are numbered 1 to 64.
        ExitStatus::Signal(libc::WTERMSIG(status) as u8)
    } else {
        ExitStatus::Code(libc::WEXITSTATUS(status) as u8)
    }
}
