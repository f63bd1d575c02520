//! A process that has been launched for the host, until its end is reported: a container's first
//! process, or an exec.

use std::fmt;
use std::os::fd::OwnedFd;

use kiln_protocol::{ExecId, ExitStatus, FromAgent, MAX_MESSAGE, StreamToken};

use crate::container::channel::Channel;
use crate::failure::{Failure, clip};
use crate::process::ProcessPlan;

/// What a process is called in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProcessName {
    /// Its container.
    pub container: String,
    /// Which exec it is; none is the container's first process.
    pub exec: Option<ExecId>,
}

impl ProcessName {
    /// A container's first process.
    pub fn first(container: &str) -> Self {
        Self { container: container.to_owned(), exec: None }
    }

    /// An exec.
    pub fn exec(container: &str, exec: ExecId) -> Self {
        Self { container: container.to_owned(), exec: Some(exec) }
    }

    /// That its program has been executed.
    pub fn started(self) -> FromAgent {
        match self {
            Self { container, exec: None } => FromAgent::Started { container },
            Self { container, exec: Some(exec) } => FromAgent::ExecStarted { container, exec },
        }
    }

    /// That it could not be set up or executed.
    pub fn failed(self, failure: Failure) -> FromAgent {
        let Failure { phase, message, exit_code } = failure;
        let message = clip(&message, MAX_MESSAGE).to_owned();
        match self {
            Self { container, exec: None } => {
                FromAgent::Failed { container, phase, message, exit_code }
            }
            Self { container, exec: Some(exec) } => {
                FromAgent::ExecFailed { container, exec, phase, message, exit_code }
            }
        }
    }
}

impl fmt::Display for ProcessName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.container)?;
        self.exec.map_or(Ok(()), |ExecId(number)| write!(f, ", exec {number}"))
    }
}

/// How far a process is.
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

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its id, in the agent's PID namespace.
    pub pid: libc::pid_t,
    /// It has ended and been reaped: by now its id may be another's.
    pub reaped: bool,
    /// How far it is.
    pub state: State,
    /// Why it is not going to be: reported when it has ended.
    pub failure: Option<Failure>,
    /// The channel to it, until it executes its program.
    pub channel: Option<Channel>,
    /// Token of the channel in the poller.
    pub channel_token: u64,
    /// What it is to be.
    pub plan: ProcessPlan,
    /// Its terminal's master, for changes of size.
    pub terminal: Option<OwnedFd>,
    /// All its streams.
    pub tokens: Vec<StreamToken>,
}

impl Process {
    /// Sends it a signal. One that has ended takes none.
    pub fn signal(&self, signal: i32) {
        if !self.reaped {
            // SAFETY: plain numbers; the id is this process's until it is reaped.
            unsafe { libc::kill(self.pid, signal) };
        }
    }

    /// Whether it has this id.
    pub fn has_id(&self, pid: libc::pid_t) -> bool {
        !self.reaped && self.pid == pid
    }
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
