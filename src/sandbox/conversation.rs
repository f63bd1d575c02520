//! What the agent may say next.
//!
//! The guest is hostile, and so is what it sends over the agent's connection: each message is
//! checked against what has been asked for, and anything else ends the sandbox.

use kiln_protocol::{ExitStatus, FailurePhase, FromAgent, VERSION};

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
    /// With a value that can't be.
    #[error("the guest's agent sent an impossible {0}")]
    Impossible(&'static str),
    /// An agent of another version.
    #[error(
        "the guest's agent (version {version}) speaks protocol {theirs}, this kiln speaks {VERSION}: \
         install kiln and its agent together"
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
}

impl Conversation {
    /// A conversation about the container of this id.
    pub fn new(container: &str) -> Self {
        Self { container: container.to_owned(), stage: Stage::Connected }
    }

    /// Notes that a create was sent.
    pub fn creating(&mut self) {
        self.stage = Stage::Creating;
    }

    /// Notes that a start was sent.
    pub fn starting(&mut self) {
        self.stage = Stage::Starting;
    }

    /// Checks a message against what may come.
    ///
    /// # Errors
    /// See [`Breach`]; the conversation is over then.
    pub fn hear(&mut self, message: FromAgent) -> Result<Progress, Breach> {
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
                if exit_code == 0 {
                    return Err(Breach::Impossible("exit code for a failure"));
                }
                (Stage::Over, Progress::Failed { phase, message: shown(&message), exit_code })
            }
            // A created container may be killed before its program is executed.
            (
                Stage::Created | Stage::Starting | Stage::Running,
                FromAgent::Exited { container, status, oom_killed },
            ) => {
                self.check(&container)?;
                if let ExitStatus::Signal(signal) = status
                    && !(1..=64).contains(&signal)
                {
                    return Err(Breach::Impossible("signal number"));
                }
                (Stage::Over, Progress::Exited { status, oom_killed })
            }
            _ => return Err(Breach::OutOfTurn { message: name, expected: going_on(stage) }),
        };
        self.stage = next;
        Ok(progress)
    }

    fn check(&self, container: &str) -> Result<(), Breach> {
        if container == self.container { Ok(()) } else { Err(Breach::OtherContainer) }
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn hello(protocol: u32) -> FromAgent {
        FromAgent::Hello { protocol, version: "0.1.0".to_owned(), kernel: "6.12".to_owned() }
    }

    fn exited(container: &str) -> FromAgent {
        FromAgent::Exited {
            container: container.to_owned(),
            status: ExitStatus::Code(0),
            oom_killed: false,
        }
    }

    fn running() -> Conversation {
        Conversation { container: "c".to_owned(), stage: Stage::Running }
    }

    #[test]
    fn whole_life() {
        let mut conversation = Conversation::new("c");
        assert!(conversation.hear(hello(VERSION)).is_ok());
        conversation.creating();
        let created = FromAgent::Created { container: "c".to_owned() };
        assert_eq!(conversation.hear(created), Ok(Progress::Created));
        conversation.starting();
        let started = FromAgent::Started { container: "c".to_owned() };
        assert_eq!(conversation.hear(started), Ok(Progress::Started));
        assert!(matches!(conversation.hear(exited("c")), Ok(Progress::Exited { .. })));
        assert!(matches!(conversation.hear(exited("c")), Err(Breach::OutOfTurn { .. })));
    }

    #[test]
    fn another_version_is_named() {
        let error = Conversation::new("c").hear(hello(VERSION + 1)).expect_err("refused");
        assert_eq!(error, Breach::Version { theirs: VERSION + 1, version: "0.1.0".to_owned() });
    }

    #[test]
    fn exit_before_start_other_containers_and_impossible_values_are_breaches() {
        let mut early = Conversation::new("c");
        early.hear(hello(VERSION)).expect("greeted");
        early.creating();
        assert!(matches!(early.hear(exited("c")), Err(Breach::OutOfTurn { .. })));
        assert_eq!(running().hear(exited("d")), Err(Breach::OtherContainer));
        let signal = FromAgent::Exited {
            container: "c".to_owned(),
            status: ExitStatus::Signal(65),
            oom_killed: false,
        };
        assert_eq!(running().hear(signal), Err(Breach::Impossible("signal number")));
    }

    #[test]
    fn a_failure_can_not_look_like_success() {
        let mut conversation = Conversation { container: "c".to_owned(), stage: Stage::Starting };
        let failed = FromAgent::Failed {
            container: "c".to_owned(),
            phase: FailurePhase::Exec,
            message: String::new(),
            exit_code: 0,
        };
        assert!(matches!(conversation.hear(failed), Err(Breach::Impossible(_))));
    }

    proptest! {
        #[test]
        fn no_sequence_reaches_an_exit_without_a_start(order in prop::collection::vec(0u8..5, 1..12)) {
            let mut conversation = Conversation::new("c");
            let container = || "c".to_owned();
            for kind in order {
                let message = match kind {
                    0 => hello(VERSION),
                    1 => FromAgent::Created { container: container() },
                    2 => FromAgent::Started { container: container() },
                    3 => exited("c"),
                    _ => FromAgent::Failed {
                        container: container(),
                        phase: FailurePhase::Config,
                        message: String::new(),
                        exit_code: 1,
                    },
                };
                let exited = matches!(conversation.hear(message), Ok(Progress::Exited { .. }));
                prop_assert!(!exited);
            }
        }
    }
}
