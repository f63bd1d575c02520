//! `kiln run`: create and start a container in a sandbox of its own.

use std::process::ExitCode;

use super::launch::{self, Options, Purpose};
use super::{Global, Reported};
use crate::sandbox::Mode;

/// Options of `kiln run`.
#[derive(Debug, clap::Args)]
pub struct Run {
    #[command(flatten)]
    options: Options,
    /// Return once the container runs; from then on it stays until it is deleted
    #[arg(short, long)]
    detach: bool,
    /// Keep the container after its end, until it is deleted
    #[arg(long)]
    keep: bool,
    /// Accepted for compatibility: processes of the container are the guest's to reap
    #[arg(long)]
    no_subreaper: bool,
}

/// Runs the container, in the foreground to its end; the exit code is its own.
pub fn run(global: &Global, run: Run) -> anyhow::Result<ExitCode> {
    let mode = if run.detach { Mode::Detached } else { Mode::Attached };
    let purpose = Purpose { mode, keep: run.keep };
    let Some(outcome) = launch::launch(global, run.options, purpose)? else {
        return Ok(ExitCode::SUCCESS);
    };
    if let Some(notice) = outcome.notice {
        eprintln!("kiln: {notice}");
    }
    match outcome.error {
        None => Ok(ExitCode::from(outcome.exit_code)),
        Some(error) => Err(Reported { exit_code: outcome.exit_code, error }.into()),
    }
}
