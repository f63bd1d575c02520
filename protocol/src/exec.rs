//! Further processes in a running container.

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::Stdio;

/// Names an exec within its container's life; chosen by the host, never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ExecId(pub u32);

/// Everything the agent needs to execute a program in a container that runs.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecProcess {
    /// The container's id.
    pub container: String,
    /// What the process is called in later messages.
    pub exec: ExecId,
    /// An OCI `process` object. What it doesn't say is not taken from the container's own process:
    /// the host has merged what is to be inherited.
    pub process: Box<RawValue>,
    /// The process's stdio. It agrees with `terminal` of the process.
    pub stdio: Stdio,
}
