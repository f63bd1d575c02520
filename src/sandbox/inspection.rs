//! What a monitor knows of its sandbox by itself, without asking the guest.

use serde::{Deserialize, Serialize};

use super::phases::Passed;

/// What a monitor knows.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Inspection {
    /// The phase that the sandbox is in.
    pub phase: String,
    /// Those before it.
    pub passed: Vec<Passed>,
    /// The last lines of the guest's console, without control characters.
    pub console: Vec<String>,
    /// What the processes of the machine last wrote to standard error, likewise.
    pub complaints: Vec<Complaints>,
    /// The processes on the host that stand for execs.
    pub execs: Vec<i32>,
}

/// What one process wrote to standard error.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Complaints {
    /// Which process.
    pub of: String,
    /// Its last lines.
    pub lines: Vec<String>,
}
