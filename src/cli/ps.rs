//! `kiln ps`: the processes of a container.
//!
//! The table has the guest's processes with the ids that they have in the guest. The JSON form is for
//! programs, which look the ids up among the host's processes (`docker top` does): it has the
//! processes on the host that stand for the container and for each exec.

use std::io::Write;
use std::process::ExitCode;

use anyhow::bail;
use kiln_protocol::GuestProcess;

use super::Global;
use super::list::{Format, print_columns};
use super::request::{self, not_running};
use crate::sandbox::control::{Processes, Request};
use crate::sandbox::tail::printable;
use crate::state::{self, Status};

/// Options of `kiln ps`.
#[derive(Debug, clap::Args)]
pub struct Ps {
    /// The form: a table of the guest's processes, or a JSON list of those on the host that stand
    /// for them
    #[arg(short, long, value_enum, default_value = "table")]
    format: Format,
    /// The container's id
    id: String,
    /// Options of ps(1): none but -ef, which is what is shown anyway
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    ps_options: Vec<String>,
}

/// Prints the processes.
pub fn run(global: &Global, ps: &Ps) -> anyhow::Result<ExitCode> {
    if let Some(option) = ps.ps_options.iter().find(|option| *option != "-ef") {
        bail!("ps option {option:?}: the processes are a guest's, whose ps is not asked: use -ef");
    }
    let container = state::find(&global.root, &ps.id)?;
    if container.status() == Status::Stopped {
        return Err(not_running().into());
    }
    let processes: Processes = request::fetch(&container, Request::Processes)?;
    let mut out = std::io::stdout().lock();
    if ps.format == Format::Json {
        serde_json::to_writer(&mut out, &processes.host)?;
        writeln!(out)?;
    } else {
        print_columns(&mut out, &table(&processes.guest))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn table(processes: &[GuestProcess]) -> Vec<[String; 5]> {
    let rows = processes.iter().map(|process| {
        [
            process.uid.to_string(),
            process.pid.to_string(),
            process.parent.to_string(),
            duration(process.cpu_time_ms / 1000),
            command(process),
        ]
    });
    std::iter::once(["UID", "PID", "PPID", "TIME", "CMD"].map(str::to_owned)).chain(rows).collect()
}

/// Hours, minutes and seconds, with days before them if there are any, as ps(1) has it.
fn duration(seconds: u64) -> String {
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let rest = format!("{hours:02}:{:02}:{:02}", seconds / 60 % 60, seconds % 60);
    if days > 0 { format!("{days}-{rest}") } else { rest }
}

/// The command line, or the name in brackets of what has none. The guest's texts lose what a
/// terminal would act on.
fn command(process: &GuestProcess) -> String {
    if process.command.is_empty() {
        return format!("[{}]", printable(&process.name));
    }
    printable(&process.command.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_ps_has_them_and_harmless() {
        let process = |command: &[&str], cpu_time_ms| GuestProcess {
            pid: 7,
            container_pid: 1,
            parent: 2,
            uid: 1000,
            cpu_time_ms,
            start_time: 0,
            command: command.iter().map(|&arg| arg.to_owned()).collect(),
            name: "name".to_owned(),
        };
        let rows = table(&[
            process(&["sh", "-c", "\x1b[2J\n"], 3_723_999),
            process(&[], (86_400 * 2 + 1) * 1000),
        ]);
        assert_eq!(rows[1], ["1000", "7", "2", "01:02:03", "sh -c [2J"].map(str::to_owned));
        assert_eq!(rows[2][3..], ["2-00:00:01", "[name]"].map(str::to_owned));
    }
}
