//! The phases of a sandbox's life, and where the time went.

use std::path::Path;
use std::time::Duration;

use serde::Serialize;

/// A phase; they follow each other in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Resources are opened and processes started.
    HostSetup,
    /// The guest's kernel runs, its agent has not called yet.
    Boot,
    /// The agent sets the container up.
    Create,
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
}

/// How long one phase took.
#[derive(Debug, PartialEq, Serialize)]
struct Timing {
    name: &'static str,
    milliseconds: f64,
}

impl Timeline {
    /// Begins with host set-up, at a time of `CLOCK_MONOTONIC`.
    pub fn begin(at: Duration) -> Self {
        Self { begun: vec![(Phase::HostSetup, at)] }
    }

    /// The phase that everything is in.
    pub fn current(&self) -> Phase {
        self.begun.last().map_or(Phase::HostSetup, |(phase, _)| *phase)
    }

    /// Goes on to the next phase.
    pub fn enter(&mut self, phase: Phase) {
        tracing::debug!(phase = phase.name(), "phase begins");
        self.begun.push((phase, now()));
    }

    /// Writes how long each phase took as JSON: `{"phases": [{"name", "milliseconds"}]}`.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, path: &Path) -> std::io::Result<()> {
        let json = serde_json::json!({ "phases": self.timings(now()) });
        std::fs::write(path, format!("{json}\n"))
    }

    fn timings(&self, end: Duration) -> Vec<Timing> {
        let ends = self.begun.iter().skip(1).map(|(_, begun)| *begun).chain([end]);
        let mut timings: Vec<Timing> = Vec::new();
        for ((phase, begun), ended) in self.begun.iter().zip(ends) {
            let milliseconds = ended.saturating_sub(*begun).as_secs_f64() * 1e3;
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

/// The time of `CLOCK_MONOTONIC`, which all processes of a host share.
pub fn now() -> Duration {
    use nix::time::{ClockId, clock_gettime};

    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_phases_are_shown_as_one() {
        let at = Duration::from_millis;
        let timeline = Timeline {
            begun: vec![
                (Phase::HostSetup, at(100)),
                (Phase::Boot, at(110)),
                (Phase::Create, at(150)),
                (Phase::Start, at(170)),
                (Phase::Run, at(180)),
            ],
        };
        let timings = timeline.timings(at(280));
        let shown: Vec<_> = timings.iter().map(|t| (t.name, t.milliseconds as u64)).collect();
        assert_eq!(shown, [("host set-up", 10), ("boot", 40), ("agent", 30), ("step", 100)]);
    }
}
