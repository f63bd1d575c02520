//! What the monitor says of the sandbox without asking the guest, and what it leaves of that when it
//! ends.

use super::Monitor;
use crate::sandbox::Outcome;
use crate::sandbox::control::{Asker, Reply};
use crate::sandbox::document;
use crate::sandbox::inspection::{Complaints, Inspection};
use crate::state::End;

impl Monitor {
    /// Answers with what the monitor knows.
    pub(super) fn inspect(&self, asker: &Asker) {
        match document::write(&self.inspection()) {
            Ok(document) => asker.answer_with(&Reply::Document, &[document]),
            Err(error) => asker.answer(&Reply::refusal(error.to_string())),
        }
    }

    fn inspection(&self) -> Inspection {
        let complaints = self
            .errors
            .iter()
            .map(|(role, tail)| Complaints { of: role.name().to_owned(), lines: tail.lines() });
        Inspection {
            phase: self.timeline.current().name().to_owned(),
            passed: self.timeline.passed_phases(),
            console: self.console.all_lines(),
            complaints: complaints.collect(),
            execs: self.execs.stand_ins().collect(),
        }
    }

    /// What is remembered of a container that has ended.
    pub(super) fn last_words(&self, outcome: &Outcome) -> End {
        End {
            exit_code: outcome.exit_code,
            error: outcome.error.clone(),
            inspection: Inspection { console: self.console.lines(), ..self.inspection() },
        }
    }
}
