//! `kiln man`: the manual pages, generated from the command line's own definition.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::CommandFactory;

use super::Arguments;

/// Options of `kiln man`.
#[derive(Debug, clap::Args)]
pub struct Man {
    /// The directory to write them to, which must exist
    #[arg(value_name = "DIR")]
    directory: PathBuf,
}

/// Writes `kiln.1` and a page for each verb.
pub fn run(man: &Man) -> anyhow::Result<ExitCode> {
    clap_mangen::generate_to(Arguments::command(), &man.directory)
        .with_context(|| man.directory.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}
