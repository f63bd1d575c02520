//! `kiln doctor`: what this host can do, and how to mend what it can't.

use std::io::{self, Write};
use std::process::ExitCode;

use super::Global;
use crate::doctor::{Report, examine};
use crate::engine::Memory;
use crate::settings::Settings;

/// Options of `kiln doctor`.
#[derive(Debug, clap::Args)]
pub struct Doctor {
    /// Test the engine again instead of reading the verdict cached for this boot of the host
    #[arg(long)]
    fresh: bool,
    /// How the checks are printed
    #[arg(long, value_enum, default_value = "text")]
    format: Format,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// For people
    Text,
    /// One JSON object
    Json,
}

/// Runs the checks; the exit code is 0 if containers can be run here, else 1.
pub fn run(global: &Global, doctor: &Doctor) -> anyhow::Result<ExitCode> {
    let settings = Settings::load(global.config.as_deref())?;
    let lib_dir = global.lib_dir.clone().or_else(|| settings.lib_dir.clone());
    let memory = if doctor.fresh { Memory::Refreshed } else { Memory::Trusted };
    let report = examine(&settings, lib_dir.as_deref(), memory);
    let mut out = io::stdout().lock();
    match doctor.format {
        Format::Json => writeln!(out, "{}", serde_json::to_string_pretty(&report)?)?,
        Format::Text => print(&mut out, &report)?,
    }
    Ok(if report.usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints the checks for people.
///
/// # Errors
/// As writing to `out`.
pub fn print(out: &mut impl Write, report: &Report) -> io::Result<()> {
    for check in &report.checks {
        writeln!(out, "{:4}  {:14}  {}", check.status, check.name, check.explanation)?;
        if let Some(mend) = &check.mend {
            writeln!(out, "{:22}-> {mend}", "")?;
        }
    }
    match report.engine {
        Some(engine) => writeln!(out, "\nengine = \"auto\" takes {engine} on this host.")?,
        None => writeln!(out, "\nNo engine can run guests on this host.")?,
    }
    if !report.usable {
        writeln!(
            out,
            "kiln can't run containers until this is mended: {}.",
            report.blockers.join(", ")
        )?;
    }
    Ok(())
}
