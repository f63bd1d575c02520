//! `kiln list`: the containers of a state directory.

use std::io::Write;
use std::process::ExitCode;

use super::Global;
use super::state::Shown;
use crate::state;

/// Options of `kiln list`.
#[derive(Debug, clap::Args)]
pub struct List {
    /// The form of the list
    #[arg(short, long, value_enum, default_value = "table")]
    format: Format,
    /// Print ids only
    #[arg(short, long)]
    quiet: bool,
}

/// How a list is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Columns for people
    Table,
    /// JSON
    Json,
}

/// Prints every container.
pub fn run(global: &Global, list: &List) -> anyhow::Result<ExitCode> {
    let containers = state::all(&global.root)?;
    let shown: Vec<_> = containers.iter().map(Shown::new).collect();
    let mut out = std::io::stdout().lock();
    if list.quiet {
        for container in shown {
            writeln!(out, "{}", container.id)?;
        }
    } else if list.format == Format::Json {
        // runc prints null for none, and its readers take it.
        let none = shown.is_empty();
        serde_json::to_writer(&mut out, &(!none).then_some(shown))?;
        writeln!(out)?;
    } else {
        table(&mut out, &shown)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(out: &mut impl Write, shown: &[Shown<'_>]) -> std::io::Result<()> {
    const HEADER: [&str; 6] = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"];

    let rows = shown.iter().map(|container| {
        [
            container.id.to_owned(),
            container.pid.to_string(),
            container.status.to_owned(),
            container.bundle.display().to_string(),
            container.created.to_owned(),
            container.owner.to_owned(),
        ]
    });
    let rows: Vec<_> = std::iter::once(HEADER.map(str::to_owned)).chain(rows).collect();
    print_columns(out, &rows)
}

/// Prints rows in columns as wide as their widest cell, at least 12 characters, as runc does.
pub fn print_columns<const N: usize>(
    out: &mut impl Write,
    rows: &[[String; N]],
) -> std::io::Result<()> {
    const LEAST: usize = 12;
    const GAP: usize = 3;

    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            if column + 1 == N {
                write!(out, "{cell}")?;
                continue;
            }
            let widest = rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
            let width = (widest + GAP).max(LEAST);
            write!(out, "{cell:width$}")?;
        }
        writeln!(out)?;
    }
    Ok(())
}
