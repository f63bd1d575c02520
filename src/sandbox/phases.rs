//! The phases of a sandbox's life, and where the time went.
//!
//! Each phase that has ended well is a line of the log, of level `info`, and a span of the trace, if there
//! is one. What takes time within a phase is a line of level `debug` and a span below the phase's.

use std::path::Path;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::trace::{Trace, Track};
use crate::log::rfc3339;

/// A phase; they follow each other in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Resources are opened and processes started.
    HostSetup,
    /// The guest's kernel runs, its agent has not called yet.
    Boot,
    /// The agent sets the container up.
    Create,
    /// The container is set up, and nobody has asked for its start yet. One that is run has no such
    /// phase.
    Wait,
    /// The agent executes the container's program.
    Start,
    /// The program runs.
    Run,
    /// The guest flushes and ends, and what is left on the host is removed.
    Teardown,
}

impl Phase {
    /// As it is named in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::HostSetup => "host set-up",
            Self::Boot => "boot",
            Self::Create => "container set-up",
            Self::Wait => "wait for start",
            Self::Start => "container start",
            Self::Run => "step",
            Self::Teardown => "teardown",
        }
    }

    /// As it is named where time is shown: what the agent does is one.
    fn timing_name(self) -> &'static str {
        match self {
            Self::Create | Self::Start => "agent",
            other => other.name(),
        }
    }
}

/// When each phase began.
#[derive(Debug)]
pub struct Timeline {
    begun: Vec<(Phase, Duration)>,
    /// The sandbox has failed: what follows is of no interest to who reads the error.
    failed: bool,
    /// Where the phases are in the trace.
    track: Track,
    /// The trace, for everything else that belongs there.
    pub trace: Trace,
}

/// How long one phase took.
#[derive(Debug, PartialEq, Serialize)]
struct Timing {
    name: &'static str,
    milliseconds: f64,
}

/// A phase that has ended.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Passed {
    /// Its name.
    pub name: String,
    /// How long it took.
    pub seconds: f64,
}

impl Timeline {
    /// Begins with host set-up, at a time of `CLOCK_MONOTONIC`.
    pub fn begin(at: Duration, mut trace: Trace, id: &str) -> Self {
        let process = std::process::id();
        let track = Track { process, row: process.into() };
        trace.name_process(process, &format!("sandbox {id}"));
        trace.name_row(track, "phases");
        Self { begun: vec![(Phase::HostSetup, at)], failed: false, track, trace }
    }

    /// The phase that everything is in.
    pub fn current(&self) -> Phase {
        self.latest().0
    }

    /// The current phase and when it began.
    fn latest(&self) -> (Phase, Duration) {
        self.begun.last().copied().unwrap_or((Phase::HostSetup, Duration::ZERO))
    }

    /// Goes on to the next phase.
    pub fn enter(&mut self, phase: Phase) {
        let at = now();
        self.end_current(at);
        tracing::debug!(phase = phase.name(), "phase begins");
        self.begun.push((phase, at));
    }

    /// Goes on to teardown before its time. Readers of the log find the failure's own line undisturbed
    /// by others of its level.
    pub fn fail(&mut self) {
        self.failed = true;
        self.enter(Phase::Teardown);
    }

    /// Ends the last phase.
    pub fn end(&mut self) {
        let at = now();
        self.end_current(at);
        let begun = self.begun.first().map_or(at, |(_, begun)| *begun);
        self.trace.span(self.track, "sandbox", begun, at, json!({}));
    }

    fn end_current(&mut self, at: Duration) {
        let (phase, begun) = self.latest();
        let start = rfc3339(wall_clock(begun));
        let duration_ms = milliseconds(at.saturating_sub(begun));
        if self.failed {
            tracing::debug!(phase = phase.name(), start, duration_ms, "phase is given up");
        } else {
            tracing::info!(phase = phase.name(), start, duration_ms, "phase has ended");
        }
        self.trace.span(self.track, phase.name(), begun, at, json!({}));
    }

    /// Notes what was done within the current phase, from `begun` until now.
    pub fn passed(&mut self, what: &'static str, begun: Duration) {
        let at = now();
        tracing::debug!(
            span = what,
            start = rfc3339(wall_clock(begun)),
            duration_ms = milliseconds(at.saturating_sub(begun)),
            "done"
        );
        self.trace.span(self.track, what, begun, at, json!({}));
    }

    /// Writes how long each phase took as JSON: `{"phases": [{"name", "milliseconds"}]}`.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let json = json!({ "phases": self.timings(now()) });
        std::fs::write(path, format!("{json}\n"))
    }

    /// The phases that have ended.
    pub fn passed_phases(&self) -> Vec<Passed> {
        let ends = self.begun.iter().skip(1).map(|(_, begun)| *begun);
        let passed = |((phase, begun), ended): (&(Phase, Duration), Duration)| Passed {
            name: phase.name().to_owned(),
            seconds: ended.saturating_sub(*begun).as_secs_f64(),
        };
        self.begun.iter().zip(ends).map(passed).collect()
    }

    fn timings(&self, end: Duration) -> Vec<Timing> {
        let ends = self.begun.iter().skip(1).map(|(_, begun)| *begun).chain([end]);
        let mut timings: Vec<Timing> = Vec::new();
        for ((phase, begun), ended) in self.begun.iter().zip(ends) {
            let milliseconds = milliseconds(ended.saturating_sub(*begun));
            match timings.last_mut() {
                Some(last) if last.name == phase.timing_name() => {
                    last.milliseconds += milliseconds;
                }
                _ => timings.push(Timing { name: phase.timing_name(), milliseconds }),
            }
        }
        timings
    }
}

/// To the microsecond.
fn milliseconds(time: Duration) -> f64 {
    time.as_micros() as f64 / 1e3
}

/// The time of `CLOCK_MONOTONIC`, which all processes of a host share.
pub fn now() -> Duration {
    use nix::time::{ClockId, clock_gettime};

    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

/// What the wall clock showed at a time of `CLOCK_MONOTONIC`, unless it was set since.
fn wall_clock(at: Duration) -> SystemTime {
    let now_on_wall = SystemTime::now();
    now_on_wall.checked_sub(now().saturating_sub(at)).unwrap_or(now_on_wall)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timeline(begun: Vec<(Phase, Duration)>) -> Timeline {
        Timeline {
            begun,
            failed: false,
            track: Track { process: 1, row: 1 },
            trace: Trace::default(),
        }
    }

    #[test]
    fn the_agents_phases_are_shown_as_one() {
        let at = Duration::from_millis;
        let timeline = timeline(vec![
            (Phase::HostSetup, at(100)),
            (Phase::Boot, at(110)),
            (Phase::Create, at(150)),
            (Phase::Start, at(170)),
            (Phase::Run, at(180)),
        ]);
        let timings = timeline.timings(at(280));
        let shown: Vec<_> = timings.iter().map(|t| (t.name, t.milliseconds as u64)).collect();
        assert_eq!(shown, [("host set-up", 10), ("boot", 40), ("agent", 30), ("step", 100)]);
    }

    #[test]
    fn a_phase_has_ended_when_the_next_has_begun() {
        let at = Duration::from_millis;
        let begun = vec![(Phase::HostSetup, at(100)), (Phase::Boot, at(350))];
        let passed = Passed { name: "host set-up".to_owned(), seconds: 0.25 };
        assert_eq!(timeline(begun).passed_phases(), [passed]);
    }

    #[test]
    fn wall_clock_goes_back_with_the_monotonic_one() {
        let begun = now().saturating_sub(Duration::from_secs(10));
        let ago = SystemTime::now().duration_since(wall_clock(begun)).expect("in the past");
        assert!(ago >= Duration::from_secs(9), "{ago:?}");
    }
}
