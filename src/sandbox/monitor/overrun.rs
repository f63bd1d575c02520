//! The limits that the monitor itself keeps: how long the step runs, and how much it writes.
//!
//! They hold whatever the guest does: the monitor's own clock and the bytes that it copies count, and
//! each measure but the last asks the guest, which the last does without. A step whose time is over
//! gets `SIGTERM`; once it has had what a guest has that is told to end
//! ([`Deadlines`](crate::sandbox::Deadlines)), `SIGKILL` with all its processes; and [`PATIENCE`] after
//! that its machine is switched off. One that writes too much is killed at once.
//!
//! A limit that another process keeps, and that does not end the step, is only noted.

use std::time::Duration;

use tokio::time::Instant;

use super::Monitor;
use super::failure::Failure;
use crate::limits::{Bytes, REACHED, Span};
use crate::sandbox::{Guest, budget};

/// What the guest has to end a step that was killed.
const PATIENCE: Duration = Duration::from_secs(2);

/// The status of a step whose time is over: that of timeout(1).
const TIME_OVER: u8 = 124;
/// The status of a step that was killed.
const KILLED: u8 = 128 + 9;

/// Which limit has been exceeded, and what comes next.
#[derive(Debug, Default)]
pub(super) struct Overrun {
    exceeded: Option<Limit>,
    /// The step has been refused something for its disk limit.
    space_used_up: bool,
    next: Option<(Instant, Measure)>,
}

#[derive(Debug, Clone, Copy)]
enum Limit {
    Deadline(Span),
    Output(Bytes),
}

#[derive(Debug, Clone, Copy)]
enum Measure {
    Terminate,
    Kill,
    SwitchOff,
}

impl Limit {
    /// As the state names it: the flag's name.
    fn name(self) -> &'static str {
        match self {
            Self::Deadline(_) => "deadline",
            Self::Output(_) => "output-limit",
        }
    }

    fn failure(self) -> Failure {
        let (exit_code, message) = match self {
            Self::Deadline(deadline) => (
                TIME_OVER,
                format!(
                    "the step's deadline of {deadline} has passed, and it was ended: if it needs \
                     more, raise --deadline (io.kiln.deadline)"
                ),
            ),
            Self::Output(limit) => (KILLED, budget::exceeded(limit)),
        };
        Failure::exceeded(message, exit_code)
    }
}

impl Overrun {
    /// When [`Monitor::enforce`] is to be called.
    pub(super) fn due(&self) -> Option<Instant> {
        self.next.map(|(time, _)| time)
    }

    /// Why the container has ended, if a limit has ended it: whatever else shows is a consequence.
    pub(super) fn failure(&self) -> Option<Failure> {
        self.exceeded.map(Limit::failure)
    }

    /// The measure whose time has come.
    fn take(&mut self, now: Instant) -> Option<Measure> {
        let (_, measure) = self.next.take_if(|(time, _)| *time <= now)?;
        Some(measure)
    }

    fn plan(&mut self, wait: Duration, measure: Measure) {
        // A time that no clock can show never comes.
        self.next = Instant::now().checked_add(wait).map(|time| (time, measure));
    }
}

impl Monitor {
    /// The file system process has begun to refuse what the step adds.
    pub(super) fn space_used_up(&mut self) -> Result<(), Failure> {
        if self.overrun.space_used_up {
            return Ok(());
        }
        self.overrun.space_used_up = true;
        self.note_reached("disk-limit")
    }

    /// What a step that failed should know of its disk limit.
    pub(super) fn space_notice(&self) -> Option<String> {
        let Guest::Own(guest) = &self.guest else { return None };
        let limit = guest.files.space.filter(|_| self.overrun.space_used_up)?;
        Some(format!(
            "the step's disk limit of {} was reached, and what it wrote beyond was refused: if it \
             needs more, raise --disk-limit (io.kiln.disk-limit)",
            Bytes(limit)
        ))
    }

    /// The step's time runs from now on.
    pub(super) fn start_clock(&mut self) {
        if let Some(deadline) = self.container.step.deadline {
            self.overrun.plan(deadline.duration(), Measure::Terminate);
        }
    }

    /// The guest is to end: that has a deadline of its own.
    pub(super) fn stop_clock(&mut self) {
        self.overrun.next = None;
    }

    /// The step has written more than it may.
    pub(super) fn output_exceeded(&mut self) -> Result<(), Failure> {
        if let Some(limit) = self.container.step.output.filter(|_| !self.ending) {
            self.note_exceeded(Limit::Output(limit))?;
            self.kill_step();
        }
        Ok(())
    }

    /// Takes the measure that is due.
    ///
    /// # Errors
    /// The last one: the machine is to be switched off.
    pub(super) fn enforce(&mut self) -> Result<(), Failure> {
        let Some(measure) = self.overrun.take(Instant::now()) else { return Ok(()) };
        let deadline = self.container.step.deadline.map(Limit::Deadline);
        match measure {
            // It has ended in time, and what it wrote is still being taken.
            Measure::Terminate if self.exit_status.is_some() => {
                self.overrun.plan(self.grace(), Measure::SwitchOff);
            }
            Measure::Terminate => {
                if let Some(deadline) = deadline {
                    self.note_exceeded(deadline)?;
                }
                self.ask_for(libc::SIGTERM, false);
                self.overrun.plan(self.grace(), Measure::Kill);
            }
            Measure::Kill => self.kill_step(),
            Measure::SwitchOff => {
                let limit = self.overrun.exceeded.or(deadline);
                if let Some(limit) = limit {
                    self.note_exceeded(limit)?;
                    return Err(limit.failure());
                }
            }
        }
        Ok(())
    }

    /// What a step has to end by itself, once its time is over.
    fn grace(&self) -> Duration {
        Duration::from_secs(self.deadlines.shutdown)
    }

    fn kill_step(&mut self) {
        self.ask_for(libc::SIGKILL, true);
        self.overrun.plan(PATIENCE, Measure::SwitchOff);
    }

    /// Has the guest send a signal to the step. One that can't is switched off later.
    fn ask_for(&mut self, signal: i32, all: bool) {
        if let Err(failure) = self.send_signal(signal, all) {
            tracing::debug!("{:#}", failure.error);
        }
    }

    fn note_exceeded(&mut self, limit: Limit) -> Result<(), Failure> {
        if self.overrun.exceeded.is_none() {
            self.overrun.exceeded = Some(limit);
            tracing::info!(limit = limit.name(), "the step has exceeded a limit and is ended");
            self.note_reached(limit.name())?;
        }
        Ok(())
    }

    /// The state names the limit that was reached first.
    fn note_reached(&mut self, limit: &str) -> Result<(), Failure> {
        self.record.annotations.entry(REACHED.to_owned()).or_insert_with(|| limit.to_owned());
        self.note(self.record.status)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_due_is_not_taken() {
        let mut overrun = Overrun::default();
        assert!(overrun.take(Instant::now()).is_none());
        overrun.plan(Duration::from_secs(60), Measure::Kill);
        let due = overrun.due().expect("planned");
        assert!(overrun.take(due - Duration::from_millis(1)).is_none());
        assert!(matches!(overrun.take(due), Some(Measure::Kill)));
        assert!(overrun.due().is_none());
    }

    #[test]
    fn a_time_beyond_the_clock_never_comes() {
        let mut overrun = Overrun::default();
        overrun.plan(Duration::MAX, Measure::Terminate);
        assert!(overrun.due().is_none());
    }

    #[test]
    fn failures_name_the_limit_its_value_and_its_flag() {
        let deadline = Limit::Deadline("90s".parse().expect("time")).failure();
        let message = deadline.error.to_string();
        assert!(message.contains("90 s") && message.contains("--deadline"), "{message}");
        assert_eq!((deadline.exit_code, message.lines().count()), (124, 1));
        let output = Limit::Output("64K".parse().expect("bytes")).failure();
        let message = output.error.to_string();
        assert!(
            message.contains("64 KiB") && message.contains("io.kiln.output-limit"),
            "{message}"
        );
        assert_eq!((output.exit_code, message.lines().count()), (137, 1));
    }
}
