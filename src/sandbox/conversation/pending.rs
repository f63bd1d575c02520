//! Execs and questions that the agent owes a word about.

use std::collections::BTreeMap;

use kiln_protocol::{Answer, ExecId, Question};

use super::{Breach, Progress, Stage, check_failure, going_on};

/// How far an exec is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Exec {
    /// Sent.
    Starting,
    /// Its program runs.
    Running,
}

/// What answers a question, beside a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Done,
    Processes,
    Statistics,
}

/// What is under way, by number.
#[derive(Debug, Default)]
pub struct Pending {
    execs: BTreeMap<ExecId, Exec>,
    questions: BTreeMap<u32, Expected>,
}

impl Pending {
    /// An exec is under way.
    pub fn execute(&mut self, exec: ExecId) {
        self.execs.insert(exec, Exec::Starting);
    }

    /// A question is under way.
    pub fn ask(&mut self, request: u32, question: &Question) {
        let expected = match question {
            Question::Pause | Question::Resume | Question::Update { .. } => Expected::Done,
            Question::Processes => Expected::Processes,
            Question::Statistics => Expected::Statistics,
        };
        self.questions.insert(request, expected);
    }

    /// An exec's program runs.
    pub fn has_running_exec(&self) -> bool {
        self.execs.values().any(|exec| *exec == Exec::Running)
    }

    /// The agent says that an exec's program runs.
    ///
    /// # Errors
    /// It can't.
    pub fn started(&mut self, exec: ExecId, stage: Stage) -> Result<Progress, Breach> {
        let message = "\"exec started\"";
        if stage == Stage::Over {
            return Err(Breach::OutOfTurn { message, expected: going_on(stage) });
        }
        match self.execs.get_mut(&exec) {
            Some(state @ Exec::Starting) => {
                *state = Exec::Running;
                Ok(Progress::ExecStarted(exec))
            }
            Some(Exec::Running) => {
                Err(Breach::OutOfTurn { message, expected: "the process was running" })
            }
            None => Err(Breach::Unknown("a process")),
        }
    }

    /// The agent says that an exec is over before it began.
    ///
    /// # Errors
    /// It isn't.
    pub fn failed(&mut self, exec: ExecId, exit_code: u8) -> Result<(), Breach> {
        check_failure(exit_code)?;
        match self.execs.remove(&exec) {
            Some(Exec::Starting) => Ok(()),
            Some(Exec::Running) => {
                let message = "\"exec failed\"";
                Err(Breach::OutOfTurn { message, expected: "the process was running" })
            }
            None => Err(Breach::Unknown("a process")),
        }
    }

    /// The agent says that an exec's program has ended.
    ///
    /// # Errors
    /// It never ran.
    pub fn exited(&mut self, exec: ExecId) -> Result<(), Breach> {
        match self.execs.remove(&exec) {
            Some(Exec::Running) => Ok(()),
            Some(Exec::Starting) => {
                let message = "\"exec exited\"";
                Err(Breach::OutOfTurn { message, expected: "the process had not started" })
            }
            None => Err(Breach::Unknown("a process")),
        }
    }

    /// The agent answers a question.
    ///
    /// # Errors
    /// It wasn't asked, or not that.
    pub fn answered(&mut self, request: u32, answer: Answer) -> Result<Progress, Breach> {
        let expected = self.questions.remove(&request).ok_or(Breach::Unknown("a question"))?;
        let answers = match &answer {
            Answer::Done => expected == Expected::Done,
            Answer::Processes(_) => expected == Expected::Processes,
            Answer::Statistics(_) => expected == Expected::Statistics,
            Answer::Refused(_) => true,
        };
        if !answers {
            return Err(Breach::Impossible("answer"));
        }
        Ok(Progress::Answered { request, answer })
    }
}
