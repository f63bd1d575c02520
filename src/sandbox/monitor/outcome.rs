//! What the command is told when the container has ended.

use super::Monitor;
use super::failure::Failure;
use crate::sandbox::Outcome;

impl Monitor {
    /// What the command is told.
    pub(super) async fn outcome(&mut self, result: Result<u8, Failure>) -> Outcome {
        // A limit that ended the step is the reason, whatever else came of that.
        let failure = match self.overrun.failure().map_or(result, Err) {
            Ok(exit_code) => {
                let failed = exit_code != 0;
                let memory = (self.oom_killed && failed).then(|| self.out_of_memory());
                let notice = memory.or_else(|| self.space_notice().filter(|_| failed));
                return Outcome { exit_code, error: None, notice };
            }
            Err(failure) => failure,
        };
        let error = Some(self.explain(&failure).await);
        Outcome { exit_code: failure.exit_code, error, notice: None }
    }

    /// What is said of a failure, with the guest's console where that may say more.
    pub(super) async fn explain(&mut self, failure: &Failure) -> String {
        let mut message = failure.message(self.timeline.current());
        if failure.shows_console() && self.guest.is_own() {
            self.hear_last_words().await;
            // Its cause stands above what a dying kernel says last.
            if let Some(cause) = self.console.last_with("Kernel panic") {
                message.push_str(&format!("\nthe guest's kernel has panicked: {cause}"));
            }
            let lines = self.console.lines();
            if lines.is_empty() {
                message.push_str("\nthe guest's console is empty");
            } else {
                message.push_str("\nlast lines of the guest's console:");
            }
            for line in lines {
                message.push_str("\n  ");
                message.push_str(&line);
            }
        }
        message
    }

    /// What a container that failed after the guest's kernel had killed processes of it should know.
    fn out_of_memory(&self) -> String {
        let (whose, mend) = match self.container.memory_limit {
            Some(limit) => (
                format!("the step's memory limit of {} MiB was reached", limit.div_ceil(1 << 20)),
                "raise linux.resources.memory.limit",
            ),
            None => (
                format!("the guest's memory of {} MiB was full", self.guest.memory_mib()),
                "set linux.resources.memory.limit, or --memory",
            ),
        };
        format!(
            "{whose}, and the guest's kernel killed processes of the step: if it needs more, {mend}"
        )
    }
}
