//! Why a container could not be set up, in the words that reach the user.

use std::fmt::Display;

use kiln_protocol::FailurePhase;
use serde::{Deserialize, Serialize};

/// A set-up that failed: what the agent reports as [`kiln_protocol::FromAgent::Failed`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct Failure {
    /// How far the set-up had come.
    pub phase: FailurePhase,
    /// What failed, naming the field of the configuration, and why.
    pub message: String,
    /// The status a shell would give.
    pub exit_code: u8,
}

impl Failure {
    /// A failure that has exit code 1.
    pub fn new(phase: FailurePhase, message: impl Into<String>) -> Self {
        Self { phase, message: message.into(), exit_code: 1 }
    }

    /// A field of the configuration that can't be honoured.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(FailurePhase::Config, message)
    }
}

/// As much of a text as goes into `length` bytes.
pub fn clip(text: &str, length: usize) -> &str {
    let mut end = text.len().min(length);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Turns any error into a [`Failure`] of a phase.
pub trait During<T> {
    /// `what` names the field or the step; the error's own text follows it.
    fn during<S: Into<String>>(
        self,
        phase: FailurePhase,
        what: impl FnOnce() -> S,
    ) -> Result<T, Failure>;
}

impl<T, E: Display> During<T> for Result<T, E> {
    fn during<S: Into<String>>(
        self,
        phase: FailurePhase,
        what: impl FnOnce() -> S,
    ) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(phase, format!("{}: {error}", what().into())))
    }
}
