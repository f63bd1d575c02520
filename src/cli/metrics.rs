//! `kiln metrics`: the figures of all sandboxes, for Prometheus.

use std::io::Write;
use std::process::ExitCode;

use anyhow::Context;

use super::Global;
use crate::{metrics, state};

/// Options of `kiln metrics`.
#[derive(Debug, clap::Args)]
pub struct Metrics {}

/// Prints the figures. A sandbox that doesn't answer is no error.
pub fn run(global: &Global) -> anyhow::Result<ExitCode> {
    let containers = state::all(&global.root)?;
    let exposition = metrics::collect(&containers).context("/proc")?;
    write!(std::io::stdout().lock(), "{exposition}")?;
    Ok(ExitCode::SUCCESS)
}
