//! How far a pod's container is in the guest, by what the agent was told of it and says.

use kiln_protocol::FromAgent;

/// The number of the last question about a container. Its monitor's own count up from 0.
pub(super) const LAST_QUESTION: u32 = u32::MAX;

/// How far the container is in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Process {
    /// The agent has not been told of it.
    Unknown,
    /// It is being set up.
    Creating,
    /// It waits for its start.
    Created,
    /// It is started, or runs.
    Started,
    /// It has ended. The agent may not have answered everything yet.
    Over,
    /// The last question about it has been asked.
    Asked,
    /// The agent has nothing more to say of it.
    Silent,
}

impl Process {
    pub(super) fn lives(self) -> bool {
        matches!(self, Self::Creating | Self::Created | Self::Started)
    }

    /// Whether the agent has anything to say of it.
    pub(super) fn is_talked_of(self) -> bool {
        self.lives() || matches!(self, Self::Over | Self::Asked)
    }

    /// How far it is after a word of the agent's.
    pub(super) fn after(self, message: &FromAgent) -> Self {
        match message {
            FromAgent::Created { .. } if self == Self::Creating => Self::Created,
            FromAgent::Exited { .. } | FromAgent::Failed { .. } if self.lives() => Self::Over,
            FromAgent::Answer { request: LAST_QUESTION, .. } if self == Self::Asked => Self::Silent,
            _ => self,
        }
    }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::{Answer, ExitStatus};

    use super::*;

    fn created() -> FromAgent {
        FromAgent::Created { container: "c".to_owned() }
    }

    fn exited() -> FromAgent {
        let status = ExitStatus::Code(0);
        FromAgent::Exited { container: "c".to_owned(), status, oom_killed: false }
    }

    fn refusal(request: u32) -> FromAgent {
        let answer = Answer::Refused(String::new());
        FromAgent::Answer { container: "c".to_owned(), request, answer }
    }

    #[test]
    fn only_the_answer_to_the_last_question_silences_the_agent() {
        for process in [Process::Creating, Process::Created, Process::Started, Process::Over] {
            assert_eq!(process.after(&refusal(LAST_QUESTION)), process);
        }
        assert_eq!(Process::Asked.after(&refusal(0)), Process::Asked);
        assert_eq!(Process::Asked.after(&refusal(LAST_QUESTION)), Process::Silent);
    }

    #[test]
    fn a_container_that_has_ended_does_not_live_again() {
        assert_eq!(Process::Creating.after(&created()), Process::Created);
        for process in [Process::Creating, Process::Created, Process::Started] {
            assert_eq!(process.after(&exited()), Process::Over);
        }
        for process in [Process::Over, Process::Asked, Process::Silent] {
            assert_eq!(process.after(&created()), process);
            assert_eq!(process.after(&exited()), process);
        }
    }
}
