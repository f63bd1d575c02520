//! `kiln run`: create and run a container in a sandbox of its own.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::Global;
use crate::settings::EngineChoice;

/// Options of `kiln run`.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Write the process id that stands for the container to this file, once it runs
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// What executes the guest's code
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// The guest's CPUs, 1 to 32
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,
    /// The guest's memory in MiB, kiln's overhead included
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// The container's id
    id: String,
}

/// Runs the container to its end; the exit code is its own.
pub fn run(_global: &Global, _run: Run) -> anyhow::Result<ExitCode> {
    bail!("this build cannot run containers")
}
