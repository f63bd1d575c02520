//! Questions about a container, and their answers.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::{Statistics, bounded};

/// Longest [`Answer::Refused`], and longest message of a failure, in bytes.
pub const MAX_MESSAGE: usize = 16 << 10;

/// Processes in one [`Answer::Processes`]. Of a container with more the list has those that are
/// oldest in the cgroup's order.
pub const MAX_PROCESSES: usize = 1024;

/// Bytes of all arguments of a [`GuestProcess`]; the agent leaves out what is beyond.
pub const MAX_COMMAND: usize = 256;

/// Longest name of a process in bytes: the kernel's `TASK_COMM_LEN` gives 15, or 63 to its own
/// threads.
pub const MAX_NAME: usize = 64;

/// What a container is asked for. Each question has one answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Question {
    /// Stop every process of the container, until it is told to resume. Answered with
    /// [`Answer::Done`] once all of them stand still. A container that is paused stays so.
    Pause,
    /// Let its processes go on. A container that isn't paused goes on.
    Resume,
    /// Which processes there are.
    Processes,
    /// What its control group has counted.
    Statistics,
    /// Change its limits. All of them are checked before any is changed; what is not named stays
    /// as it is.
    Update {
        /// An OCI `linux.resources` object.
        resources: Box<RawValue>,
    },
}

/// The answer to a [`Question`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Answer {
    /// It was done.
    Done,
    /// At most [`MAX_PROCESSES`] of them.
    Processes(
        #[serde(deserialize_with = "bounded::list::<_, _, MAX_PROCESSES>")] Vec<GuestProcess>,
    ),
    /// The figures.
    Statistics(Box<Statistics>),
    /// It was not done: why, naming the field if there is one.
    Refused(#[serde(deserialize_with = "bounded::text::<_, MAX_MESSAGE>")] String),
}

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestProcess {
    /// Its id in the guest's initial PID namespace, not 0.
    pub pid: u32,
    /// Its id in the innermost PID namespace that it is in.
    pub container_pid: u32,
    /// Its parent's id in the guest's initial PID namespace; 0 if that has none there.
    pub parent: u32,
    /// Its effective user id in the guest's initial user namespace.
    pub uid: u32,
    /// Processor time of all its threads, user and system, in milliseconds.
    pub cpu_time_ms: u64,
    /// When it was started, in milliseconds since the guest's boot.
    pub start_time: u64,
    /// Its arguments, as far as [`MAX_COMMAND`] bytes go. Empty for a process that has none.
    #[serde(deserialize_with = "bounded::command::<_, MAX_COMMAND>")]
    pub command: Vec<String>,
    /// Its name, as in `/proc/<pid>/comm`.
    #[serde(deserialize_with = "bounded::text::<_, MAX_NAME>")]
    pub name: String,
}
