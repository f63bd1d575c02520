//! `kiln events`: a container's figures at intervals, and its processes killed for want of memory,
//! each a line of JSON as runc prints it.
//!
//! The figures are the guest's own, of the container's cgroup there.

mod stats;

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kiln_protocol::Statistics;
use nix::sys::socket::MsgFlags;
use serde::Serialize;

use self::stats::Stats;
use super::{Global, Reported, request};
use crate::readiness::readable_by;
use crate::sandbox::control::{self, Reply, Request};
use crate::sandbox::{document, packet};
use crate::state::{self, Status};

/// Options of `kiln events`.
#[derive(Debug, clap::Args)]
pub struct Events {
    /// Print the figures once and return
    #[arg(long)]
    stats: bool,
    /// How often the figures are printed, in Go's form: 5s, 500ms, 1m30s
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_interval)]
    interval: Duration,
    /// The container's id
    id: String,
}

/// A line of output.
#[derive(Debug, Serialize)]
struct Event<'a> {
    r#type: &'static str,
    id: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Stats>,
}

/// Prints events until the container has ended.
pub fn run(global: &Global, events: &Events) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &events.id)?;
    if container.status() == Status::Stopped {
        bail!("container with id {} is not running", events.id);
    }
    let lines = Lines { id: &events.id };
    if events.stats {
        lines.print_stats(request::fetch(&container, Request::Statistics)?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let connection = control::reach(&container).context("the sandbox's monitor")?;
    packet::send_with(connection.as_fd(), &Request::Watch, &[])?;
    lines.follow(connection.as_fd(), events.interval)
}

struct Lines<'a> {
    id: &'a str,
}

impl Lines<'_> {
    /// Prints what the monitor says, and asks it for figures at each interval, until it has ended.
    fn follow(&self, monitor: BorrowedFd<'_>, interval: Duration) -> anyhow::Result<ExitCode> {
        let mut next = Instant::now() + interval;
        let mut watching = false;
        loop {
            if readable_by(monitor, Some(next))? {
                let Some((reply, descriptors)) = packet::receive_with(monitor, MsgFlags::empty())?
                else {
                    return Ok(ExitCode::SUCCESS);
                };
                match reply {
                    Reply::Done => watching = true,
                    Reply::OomKilled => {
                        self.print(&Event { r#type: "oom", id: self.id, data: None })?
                    }
                    Reply::Document => {
                        let document = document::read(descriptors)?;
                        self.print_stats(serde_json::from_str(document.get())?)?;
                    }
                    // Of a container that is about to end there are no figures; its end is told next.
                    Reply::Failed { message, .. } if watching => {
                        tracing::debug!(message, "no figures for now");
                    }
                    Reply::Failed { message, exit_code } => {
                        return Err(Reported { exit_code, error: message }.into());
                    }
                    other => bail!("the monitor says {other:?}"),
                }
            } else {
                next = Instant::now() + interval;
                // A monitor that has ended shows by the connection.
                let _ = packet::send_with(monitor, &Request::Statistics, &[]);
            }
        }
    }

    fn print_stats(&self, figures: Statistics) -> anyhow::Result<()> {
        self.print(&Event { r#type: "stats", id: self.id, data: Some(figures.into()) })
    }

    fn print(&self, event: &Event<'_>) -> anyhow::Result<()> {
        let mut out = io::stdout().lock();
        serde_json::to_writer(&mut out, event)?;
        writeln!(out)?;
        Ok(out.flush()?)
    }
}

/// A duration as Go writes it: numbers, which may have a fraction, each with a unit.
fn parse_interval(text: &str) -> Result<Duration, String> {
    const UNITS: [(&str, f64); 7] = [
        ("ns", 1e-9),
        ("us", 1e-6),
        ("µs", 1e-6),
        ("ms", 1e-3),
        ("s", 1.0),
        ("m", 60.0),
        ("h", 3600.0),
    ];
    let malformed = || format!("{text:?} is no duration: use a number with a unit, as in 5s");
    let mut seconds = 0.0;
    let mut rest = text;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let (digits, after) = rest.split_at(number);
        let unit = after.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(after.len());
        let (unit, after) = after.split_at(unit);
        let value: f64 = digits.parse().map_err(|_| malformed())?;
        let scale = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?.1;
        seconds += value * scale;
        rest = after;
    }
    match Duration::try_from_secs_f64(seconds) {
        Ok(duration) if !duration.is_zero() => Ok(duration),
        Ok(_) => Err("duration interval must be greater than 0".to_owned()),
        Err(_) => Err(malformed()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn intervals_are_in_gos_form() {
        for (text, milliseconds) in
            [("5s", 5000), ("500ms", 500), ("1m30s", 90_000), ("1.5s", 1500), ("2h", 7_200_000)]
        {
            assert_eq!(parse_interval(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "0s", "5", "s", "-1s", "1x", "1e400s", "99999999999999999999h", "1.2.3s"] {
            assert!(parse_interval(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_an_interval_or_an_error(text in ".{0,20}") {
            if let Ok(interval) = parse_interval(&text) {
                prop_assert!(!interval.is_zero());
            }
        }
    }
}
