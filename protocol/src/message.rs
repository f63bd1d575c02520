//! The control connection's messages.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::ask::MAX_MESSAGE;
use crate::{Answer, ExecId, ExecProcess, Network, Question, StreamToken, bounded};

/// A message from the monitor to the agent.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ToAgent {
    /// Answers [`FromAgent::Hello`]; the agent does nothing before it.
    Welcome {
        /// The host's [`crate::VERSION`].
        protocol: u32,
        /// The host's wall clock, nanoseconds since 1970: the guest's clock is set to it.
        unix_time_ns: i64,
        /// 32 bytes from the host's random generator, credited to the guest's.
        entropy: [u8; 32],
    },
    /// The host's wall clock has jumped.
    SetClock {
        /// What it shows, nanoseconds since 1970: the guest's clock is set to it.
        unix_time_ns: i64,
    },
    /// Set a container up to just before its program is executed.
    Create(Box<CreateContainer>),
    /// Execute the program of a created container.
    Start {
        /// The container.
        container: String,
        /// The network that it gets before; without one it has its loopback interface only.
        network: Option<Box<Network>>,
    },
    /// Send a signal to a container.
    Signal {
        /// The container.
        container: String,
        /// To this exec's process; without one, to the container's first.
        exec: Option<ExecId>,
        /// Signal number, 1 to 64.
        signal: i32,
        /// To every process of the container instead, whichever is named.
        all: bool,
    },
    /// The size of a terminal has changed.
    Resize {
        /// The container.
        container: String,
        /// The terminal is this exec's; without one, the container's first process's.
        exec: Option<ExecId>,
        /// The new size.
        size: WindowSize,
    },
    /// Execute a further program in a container that runs.
    Exec(Box<ExecProcess>),
    /// A question about a container.
    Ask {
        /// Comes back with the answer.
        request: u32,
        /// The container.
        container: String,
        /// What is asked.
        question: Question,
    },
    /// Kill what still runs, flush file systems and end the guest.
    Shutdown,
}

/// A message from the agent to the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromAgent {
    /// The first message on the connection.
    Hello {
        /// The agent's [`crate::VERSION`].
        protocol: u32,
        /// The agent's package version.
        version: String,
        /// The guest kernel's release, as `uname -r` prints it.
        kernel: String,
    },
    /// Answers [`ToAgent::Create`].
    Created {
        /// The container.
        container: String,
    },
    /// Answers [`ToAgent::Start`]: the program has been executed.
    Started {
        /// The container.
        container: String,
    },
    /// A create or start that failed; the container is gone.
    Failed {
        /// The container.
        container: String,
        /// How far it came.
        phase: FailurePhase,
        /// What failed, naming the field of the configuration, and why.
        message: String,
        /// The status that a shell would give: 127 for a program that isn't found, 126 for one
        /// that can't be executed, 1 for the rest.
        exit_code: u8,
    },
    /// The container's first process has ended. Its output may still be on its way: the streams
    /// end by themselves.
    Exited {
        /// The container.
        container: String,
        /// How it ended.
        status: ExitStatus,
        /// Whether the container's memory limit had processes killed.
        oom_killed: bool,
    },
    /// Answers [`ToAgent::Exec`]: the program has been executed.
    ExecStarted {
        /// The container.
        container: String,
        /// The exec.
        exec: ExecId,
    },
    /// Answers [`ToAgent::Exec`]: the program could not be executed, and the exec is over.
    ExecFailed {
        /// The container.
        container: String,
        /// The exec.
        exec: ExecId,
        /// How far it came.
        phase: FailurePhase,
        /// What failed, naming the field of the process, and why.
        #[serde(deserialize_with = "bounded::text::<_, MAX_MESSAGE>")]
        message: String,
        /// As of [`FromAgent::Failed`].
        exit_code: u8,
    },
    /// An exec's process has ended, after [`FromAgent::ExecStarted`] and before the container's
    /// [`FromAgent::Exited`]. Its output may still be on its way.
    ExecExited {
        /// The container.
        container: String,
        /// The exec.
        exec: ExecId,
        /// How it ended.
        status: ExitStatus,
    },
    /// Answers [`ToAgent::Ask`].
    Answer {
        /// The container that the question was about.
        container: String,
        /// The question's number.
        request: u32,
        /// The answer.
        answer: Answer,
    },
    /// The kernel has killed processes of a container for want of memory. Sent unasked, while the
    /// container lives, each time that the number has grown.
    OomKilled {
        /// The container.
        container: String,
        /// Processes killed since the container was created.
        kills: u64,
    },
}

/// How far a container's set-up had come when it failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailurePhase {
    /// Reading the configuration.
    Config,
    /// Namespaces.
    Namespaces,
    /// Network interfaces.
    Network,
    /// Root file system and mounts.
    Mounts,
    /// Control groups.
    Cgroups,
    /// Identity: users, capabilities, seccomp, limits.
    Process,
    /// Stdio streams or the terminal.
    Stdio,
    /// Hooks that run in the container.
    Hooks,
    /// Executing the program.
    Exec,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It returned this status, 0 to 255.
    Code(u8),
    /// This signal, 1 to 64, ended it.
    Signal(u8),
}

impl ExitStatus {
    /// The status that a shell gives: 128 and the number for a signal.
    #[must_use]
    pub fn in_shell(self) -> u8 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => signal.saturating_add(128),
        }
    }
}

impl FromAgent {
    /// The container that it is about; none for a greeting.
    #[must_use]
    pub fn container(&self) -> Option<&str> {
        match self {
            Self::Hello { .. } => None,
            Self::Created { container }
            | Self::Started { container }
            | Self::Failed { container, .. }
            | Self::Exited { container, .. }
            | Self::ExecStarted { container, .. }
            | Self::ExecFailed { container, .. }
            | Self::ExecExited { container, .. }
            | Self::Answer { container, .. }
            | Self::OomKilled { container, .. } => Some(container),
        }
    }
}

/// Everything the agent needs to set a container up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateContainer {
    /// The container's id, which no other of the sandbox has.
    pub container: String,
    /// The bundle's `config.json`, byte for byte as the monitor checked it.
    pub config: Box<RawValue>,
    /// The container's OCI state, an object, for hooks that run in the container. The agent adds
    /// `status` and `pid`, which are the moment's.
    pub state: Box<RawValue>,
    /// Where its root file system is in the share.
    pub rootfs: String,
    /// Which entries of `mounts` are bind mounts from the host, and where they are in the share.
    /// The entries not named here are mounted by the guest itself (proc, tmpfs, ...).
    pub binds: Vec<BindMount>,
    /// The namespaces of another container that it lives in.
    pub joined: Option<Joined>,
    /// The process's stdio.
    pub stdio: Stdio,
}

/// Namespaces that a container has in common with one that was set up before it: a pod's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Joined {
    /// The container whose first process is in them.
    pub container: String,
    /// Its network namespace. What `linux.namespaces` says of this type and of the following has no
    /// effect where they are joined.
    pub network: bool,
    /// Its IPC namespace.
    pub ipc: bool,
    /// Its UTS namespace.
    pub uts: bool,
    /// The container whose PID namespace it lives in: that one, or another of the pod's. Without it, it
    /// has one of its own.
    pub processes: Option<String>,
}

/// A bind mount that the host has put in the share.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BindMount {
    /// Index into `mounts` of the configuration.
    pub mount: usize,
    /// Where it is in the share.
    pub path: String,
    /// The source is a file, a socket or a device, not a directory.
    pub is_file: bool,
}

/// Where a process's stdio goes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Stdio {
    /// A pseudo-terminal in the guest; its master is one stream for both directions.
    Terminal {
        /// The stream.
        stream: StreamToken,
        /// The size at start.
        size: WindowSize,
    },
    /// Three pipes. One that is absent is `/dev/null` in the guest.
    Pipes {
        /// Standard input: the host half-closes the stream at end of file.
        stdin: Option<StreamToken>,
        /// Standard output: the agent half-closes the stream when the last writer is gone.
        stdout: Option<StreamToken>,
        /// Standard error, likewise.
        stderr: Option<StreamToken>,
    },
}

/// A terminal's size in characters, as in `struct winsize`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WindowSize {
    /// Rows.
    pub rows: u16,
    /// Columns.
    pub columns: u16,
}
