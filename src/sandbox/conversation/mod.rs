//! What the agent may say next.
//!
//! The guest is hostile, and so is what it sends over the agent's connection: each message is
//! checked against what has been asked for, and anything else ends the sandbox.
//!
//! * The container goes through [`Stage`]s, each with what may end it.
//! * Beside it, [`pending`]: execs and questions, of which many may be under way, each by a number
//!   that the host gave it.

mod pending;
#[cfg(test)]
mod tests;

use kiln_protocol::{Answer, ExecId, ExitStatus, FailurePhase, FromAgent, Question, VERSION};

use self::pending::Pending;

/// How far the conversation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Nothing has been said.
    Connected,
    /// Hello was said; a create is what comes next.
    Greeted,
    /// A create was sent.
    Creating,
    /// The container is set up.
    Created,
    /// A start was sent.
    Starting,
    /// The container's program runs.
    Running,
    /// It has ended, or never began.
    Over,
}

/// What an allowed message means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// The agent is there, of the right version.
    Greeted {
        /// Its version.
        version: String,
        /// The guest kernel's release.
        kernel: String,
    },
    /// The container is set up.
    Created,
    /// The container's program runs.
    Started,
    /// It could not be set up or executed.
    Failed {
        /// How far it came.
        phase: FailurePhase,
        /// Why.
        message: String,
        /// The status that the command exits with, not 0.
        exit_code: u8,
    },
    /// The program has ended.
    Exited {
        /// How.
        status: ExitStatus,
        /// Whether its memory limit had processes killed.
        oom_killed: bool,
    },
    /// The start of a container that had ended before it was heard of.
    StartedTooLate,
    /// An exec's program runs.
    ExecStarted(ExecId),
    /// An exec could not be executed, and is over.
    ExecFailed {
        /// The exec.
        exec: ExecId,
        /// Why.
        message: String,
        /// The status that the command exits with, not 0.
        exit_code: u8,
    },
    /// An exec's program has ended.
    ExecExited {
        /// The exec.
        exec: ExecId,
        /// How.
        status: ExitStatus,
    },
    /// A question is answered, by an answer of its kind or a refusal.
    Answered {
        /// The question's number.
        request: u32,
        /// The answer.
        answer: Answer,
    },
    /// More processes than before have been killed for want of memory.
    OomKilled {
        /// How many in all.
        kills: u64,
    },
}

/// A message that isn't allowed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Breach {
    /// Of another kind than what may come.
    #[error("the guest's agent sent {message} while {expected}")]
    OutOfTurn {
        /// What it sent.
        message: &'static str,
        /// What was going on.
        expected: &'static str,
    },
    /// About a container that it was never told of.
    #[error("the guest's agent spoke of a container that it does not have")]
    OtherContainer,
    /// About an exec or a question that it was never told of, or that is over.
    #[error("the guest's agent spoke of {0} that it does not have")]
    Unknown(&'static str),
    /// With a value that can't be.
    #[error("the guest's agent sent an impossible {0}")]
    Impossible(&'static str),
    /// An agent of another version.
    #[error(
        "the guest's agent (version {version}) speaks protocol {theirs}, this kiln speaks {VERSION}"
    )]
    Version {
        /// The agent's protocol version.
        theirs: u32,
        /// The agent's package version.
        version: String,
    },
}

/// The conversation about one container.
#[derive(Debug)]
pub struct Conversation {
    container: String,
    stage: Stage,
    /// The container has ended while a start was on its way: that may be answered yet.
    start_crossed: bool,
    pending: Pending,
    /// Processes that the agent said were killed for want of memory.
    oom_kills: u64,
}

impl Conversation {
    /// A conversation about the container of this id.
    pub fn new(container: &str) -> Self {
        let (pending, container) = (Pending::default(), container.to_owned());
        let (stage, start_crossed) = (Stage::Connected, false);
        Self { container, stage, start_crossed, pending, oom_kills: 0 }
    }

    /// A conversation with an agent that others have greeted.
    pub fn joined(container: &str) -> Self {
        Self { stage: Stage::Greeted, ..Self::new(container) }
    }

    /// Notes that a create was sent.
    pub fn creating(&mut self) {
        self.stage = Stage::Creating;
    }

    /// Notes that a start was sent.
    pub fn starting(&mut self) {
        self.stage = Stage::Starting;
    }

    /// Notes that an exec was sent, of a number that was never used.
    pub fn executing(&mut self, exec: ExecId) {
        self.pending.execute(exec);
    }

    /// Notes that a question was sent, of a number that was never used.
    pub fn asking(&mut self, request: u32, question: &Question) {
        self.pending.ask(request, question);
    }

    /// Checks a message against what may come.
    ///
    /// # Errors
    /// See [`Breach`]; the conversation is over then.
    pub fn hear(&mut self, message: FromAgent) -> Result<Progress, Breach> {
        match message {
            FromAgent::ExecStarted { container, exec } => {
                self.check(&container)?;
                self.pending.started(exec, self.stage)
            }
            FromAgent::ExecFailed { container, exec, phase, message, exit_code } => {
                self.check(&container)?;
                tracing::debug!(?phase, "the agent could not execute a process");
                let message = shown(&message);
                self.pending.failed(exec, exit_code)?;
                Ok(Progress::ExecFailed { exec, message, exit_code })
            }
            FromAgent::ExecExited { container, exec, status } => {
                self.check(&container)?;
                check_status(status)?;
                self.pending.exited(exec)?;
                Ok(Progress::ExecExited { exec, status })
            }
            FromAgent::Answer { container, request, answer } => {
                self.check(&container)?;
                self.pending.answered(request, answer)
            }
            FromAgent::OomKilled { container, kills } => {
                self.check(&container)?;
                self.count_kills(kills)
            }
            other => self.hear_of_container(other),
        }
    }

    fn hear_of_container(&mut self, message: FromAgent) -> Result<Progress, Breach> {
        let stage = std::mem::replace(&mut self.stage, Stage::Over);
        let name = name_of(&message);
        let (next, progress) = match (stage, message) {
            (Stage::Connected, FromAgent::Hello { protocol, version, kernel }) => {
                let (version, kernel) = (shown(&version), shown(&kernel));
                if protocol != VERSION {
                    return Err(Breach::Version { theirs: protocol, version });
                }
                (Stage::Greeted, Progress::Greeted { version, kernel })
            }
            (Stage::Creating, FromAgent::Created { container }) => {
                self.check(&container)?;
                (Stage::Created, Progress::Created)
            }
            (Stage::Starting, FromAgent::Started { container }) => {
                self.check(&container)?;
                (Stage::Running, Progress::Started)
            }
            (
                Stage::Creating | Stage::Starting,
                FromAgent::Failed { container, phase, message, exit_code },
            ) => {
                self.check(&container)?;
                check_failure(exit_code)?;
                (Stage::Over, Progress::Failed { phase, message: shown(&message), exit_code })
            }
            // A created container may be killed before its program is executed.
            (
                Stage::Created | Stage::Starting | Stage::Running,
                FromAgent::Exited { container, status, oom_killed },
            ) => {
                self.check(&container)?;
                check_status(status)?;
                if self.pending.has_running_exec() {
                    return Err(Breach::Impossible("end of a container before its processes'"));
                }
                self.start_crossed = stage == Stage::Starting;
                (Stage::Over, Progress::Exited { status, oom_killed })
            }
            (Stage::Over, FromAgent::Failed { container, exit_code, .. })
                if std::mem::take(&mut self.start_crossed) =>
            {
                self.check(&container)?;
                check_failure(exit_code)?;
                (Stage::Over, Progress::StartedTooLate)
            }
            _ => return Err(Breach::OutOfTurn { message: name, expected: going_on(stage) }),
        };
        self.stage = next;
        Ok(progress)
    }

    fn count_kills(&mut self, kills: u64) -> Result<Progress, Breach> {
        if !matches!(self.stage, Stage::Created | Stage::Starting | Stage::Running) {
            let message = "\"out of memory\"";
            return Err(Breach::OutOfTurn { message, expected: going_on(self.stage) });
        }
        if kills <= self.oom_kills {
            return Err(Breach::Impossible("number of processes killed"));
        }
        self.oom_kills = kills;
        Ok(Progress::OomKilled { kills })
    }

    fn check(&self, container: &str) -> Result<(), Breach> {
        if container == self.container { Ok(()) } else { Err(Breach::OtherContainer) }
    }
}

fn check_failure(exit_code: u8) -> Result<(), Breach> {
    if exit_code == 0 { Err(Breach::Impossible("exit code for a failure")) } else { Ok(()) }
}

fn check_status(status: ExitStatus) -> Result<(), Breach> {
    match status {
        ExitStatus::Signal(signal) if !(1..=64).contains(&signal) => {
            Err(Breach::Impossible("signal number"))
        }
        ExitStatus::Code(_) | ExitStatus::Signal(_) => Ok(()),
    }
}

fn name_of(message: &FromAgent) -> &'static str {
    match message {
        FromAgent::Hello { .. } => "a greeting",
        FromAgent::Created { .. } => "\"created\"",
        FromAgent::Started { .. } => "\"started\"",
        FromAgent::Failed { .. } => "\"failed\"",
        FromAgent::Exited { .. } => "\"exited\"",
        FromAgent::ExecStarted { .. } => "\"exec started\"",
        FromAgent::ExecFailed { .. } => "\"exec failed\"",
        FromAgent::ExecExited { .. } => "\"exec exited\"",
        FromAgent::Answer { .. } => "an answer",
        FromAgent::OomKilled { .. } => "\"out of memory\"",
    }
}

fn going_on(stage: Stage) -> &'static str {
    match stage {
        Stage::Connected => "it had not greeted",
        Stage::Greeted | Stage::Created => "it had nothing to do",
        Stage::Creating => "it was to set the container up",
        Stage::Starting => "it was to start the container",
        Stage::Running => "the container was running",
        Stage::Over => "the container had ended",
    }
}

/// A text of the agent's as it may reach a terminal or a log: no control characters but newline,
/// of bounded length.
fn shown(text: &str) -> String {
    text.chars().filter(|&c| c == '\n' || !c.is_control()).take(4096).collect()
}
