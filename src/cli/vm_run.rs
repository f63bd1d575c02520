//! `kiln vm run`: boot a kernel of the user's own with its console on standard input and output.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;

use super::Global;
use crate::settings::EngineChoice;

/// Options of `kiln vm run`.
#[derive(Debug, clap::Args)]
pub struct VmRun {
    /// The kernel: an uncompressed x86-64 ELF
    #[arg(long, value_name = "ELF")]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line
    #[arg(long, value_name = "TEXT", default_value = "")]
    cmdline: String,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512)]
    memory: u64,
    /// CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    cpus: u8,
    /// A raw disk image, read-only with `:ro` appended; may be given several times
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    disks: Vec<String>,
    /// What executes the guest's code
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
}

/// Boots the kernel and waits for the machine's end.
pub fn run(_global: &Global, _run: VmRun) -> anyhow::Result<ExitCode> {
    bail!("this build cannot run machines")
}
