//! `kiln --version`: kiln, its protocol, its guest kernel and its agent.

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use super::Global;
use crate::artefacts::{Artefacts, KernelDescription};
use crate::settings::Settings;

/// The version of the OCI runtime specification that kiln implements.
pub const SPEC_VERSION: &str = "1.2.0";

/// Prints one line for each.
pub fn print(global: &Global) -> anyhow::Result<ExitCode> {
    let settings = Settings::load(global.config.as_deref())?;
    write(
        &mut std::io::stdout().lock(),
        global.lib_dir.as_deref().or(settings.lib_dir.as_deref()),
    )?;
    Ok(ExitCode::SUCCESS)
}

/// Writes the lines. What isn't installed is said to be missing, and is no error here.
///
/// # Errors
/// As writing to `out`.
pub fn write(out: &mut impl Write, lib_dir: Option<&Path>) -> io::Result<()> {
    writeln!(out, "kiln version {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(out, "protocol: {}", kiln_protocol::VERSION)?;
    writeln!(out, "spec: {}", SPEC_VERSION)?;
    match Artefacts::find(lib_dir) {
        Ok(artefacts) => {
            match artefacts.kernel_description() {
                Ok(KernelDescription { kernel_release, source_version, .. }) => {
                    writeln!(out, "kernel: {kernel_release} (source {source_version})")?;
                }
                Err(error) => writeln!(out, "kernel: {:#}", anyhow::Error::new(error))?,
            }
            match artefacts.agent_version() {
                Ok(version) => writeln!(out, "agent: {version}")?,
                Err(error) => writeln!(out, "agent: {:#}", anyhow::Error::new(error))?,
            }
        }
        Err(error) => writeln!(out, "kernel, agent: {error}")?,
    }
    Ok(())
}
