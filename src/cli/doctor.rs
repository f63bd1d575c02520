//! `kiln doctor`: what this host can do, and how to mend what it can't.

use std::process::ExitCode;

use anyhow::bail;

use super::Global;

/// Options of `kiln doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Check again instead of reading the verdict cached for this boot of the host
    #[arg(long)]
    fresh: bool,
    /// Print the checks as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the checks; the exit code is 0 if an engine can run containers here.
pub fn run(_global: &Global, _doctor: &Doctor) -> anyhow::Result<ExitCode> {
    bail!("this build has no checks")
}
