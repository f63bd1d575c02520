//! `kiln exec`: execute a further program in a running container.
//!
//! In the foreground the exit code is the program's, 128 and the signal's number if a signal ended
//! it; 127 and 126 for a program that isn't found or can't be executed; and, as runc has it, 255 for
//! everything else that keeps it from being executed. Who waits for the process in the pid file
//! reads the same status from that.

use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::Value;

use super::console::Console;
use super::launch::refuse_descriptors;
use super::{Global, Reported, request};
use crate::bundle::{Changes, Program};
use crate::mend;
use crate::process::{Launch, describe};
use crate::sandbox::ProxyConfig;
use crate::sandbox::client::{Client, Ending};
use crate::sandbox::control::{self, EXEC_REFUSED, Request};
use crate::sandbox::pidfd_socket::PidfdSocket;
use crate::state::{self, Container, Status};

/// Options of `kiln exec`.
#[derive(Debug, clap::Args)]
pub struct Exec {
    /// Take the process from this file, an OCI process object, instead of from the container's own
    /// process and the options below
    #[arg(short, long, value_name = "FILE")]
    process: Option<PathBuf>,
    /// Return once the program runs
    #[arg(short, long)]
    detach: bool,
    /// Write the process id that stands for the program to this file, last of all
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Send the master of the program's terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Send a descriptor of the process that stands for the program to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// Give the program a terminal
    #[arg(short, long)]
    tty: bool,
    /// The user, by number, and group
    #[arg(short, long, value_name = "UID[:GID]", value_parser = parse_user)]
    user: Option<User>,
    /// A further group, by number
    #[arg(short = 'g', long, value_name = "GID")]
    additional_gids: Vec<u32>,
    /// A further capability
    #[arg(short, long, value_name = "NAME")]
    cap: Vec<String>,
    /// The working directory in the container
    #[arg(long, value_name = "DIR")]
    cwd: Option<PathBuf>,
    /// A further environment variable
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Keep the program from gaining privileges
    #[arg(long)]
    no_new_privs: bool,
    /// Execute it in a paused container too: it begins when that is resumed
    #[arg(long)]
    ignore_paused: bool,
    /// Refused: the guest's kernel has no AppArmor
    #[arg(long, value_name = "PROFILE")]
    apparmor: Option<String>,
    /// Refused: the guest's kernel has no SELinux
    #[arg(long, value_name = "LABEL")]
    process_label: Option<String>,
    /// Refused: the container's cgroup in its guest is the only one
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// Refused unless 0: descriptors of the host mean nothing in a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// Accepted for compatibility: processes of the container are the guest's to reap
    #[arg(long)]
    no_subreaper: bool,
    /// The container's id
    id: String,
    /// The program and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy)]
struct User {
    uid: u32,
    gid: Option<u32>,
}

fn parse_user(text: &str) -> Result<User, String> {
    let number = |text: &str| {
        text.parse::<u32>().map_err(|_| format!("{text:?} is no number: use UID or UID:GID"))
    };
    match text.split_once(':') {
        Some((uid, gid)) => Ok(User { uid: number(uid)?, gid: Some(number(gid)?) }),
        None => Ok(User { uid: number(text)?, gid: None }),
    }
}

/// Executes the program, in the foreground to its end; the exit code is its own.
pub fn run(global: &Global, exec: Exec) -> anyhow::Result<ExitCode> {
    let ending = execute(global, exec).map_err(|error| {
        let error = mend::append(&format!("exec failed: {error:#}"));
        Reported { exit_code: EXEC_REFUSED, error }
    })?;
    match ending {
        Ending::Released => Ok(ExitCode::SUCCESS),
        Ending::Outcome(outcome) => match outcome.error {
            None => Ok(ExitCode::from(outcome.exit_code)),
            Some(error) => {
                let error = format!("exec failed: {error}");
                Err(Reported { exit_code: outcome.exit_code, error }.into())
            }
        },
        // As it is for runc, whose process would have been the program's own.
        Ending::Died(status) => match status.signal().map(|signal| u8::try_from(128 + signal)) {
            Some(Ok(exit_code)) => Ok(ExitCode::from(exit_code)),
            _ => {
                let error = format!("exec failed: its process {} too early", describe(status));
                Err(Reported { exit_code: EXEC_REFUSED, error }.into())
            }
        },
    }
}

fn execute(global: &Global, exec: Exec) -> anyhow::Result<Ending> {
    refuse_descriptors(exec.preserve_fds)?;
    exec.refuse_labels()?;
    let container = state::find(&global.root, &exec.id)?;
    if container.status() == Status::Stopped {
        bail!("cannot exec in a stopped container");
    }
    let program = exec.program(&container)?;
    let console = Console {
        wanted: program.process.terminal().unwrap_or(false),
        socket: exec.console_socket.as_deref(),
        attached: !exec.detach,
    };
    let terminal = console.size(Some(&program.process))?;
    let monitor = control::reach(&container).context("the sandbox's monitor")?;
    let (mut client, command) = Client::new()?;
    let pidfd_socket = exec.pidfd_socket.as_deref().map(PidfdSocket::for_exec);
    client.send_pidfd(pidfd_socket.transpose()?);
    let mut launch = Launch::stand_in("exec-proxy", &global.for_stand_in());
    let raw_mode = console.attach(&mut launch, terminal)?;
    let config = ProxyConfig {
        container: exec.id,
        process: program.json,
        terminal,
        ignore_paused: exec.ignore_paused,
        cgroup: container.record.cgroup,
        container_process: container.record.monitor,
        monitor: launch.give(monitor),
        command: launch.give(command),
        detached: exec.detach,
        pid_file: exec.pid_file.map(std::path::absolute).transpose()?,
    };
    launch.configure(&config)?;
    let ending = client.stand_by(launch);
    drop(raw_mode);
    ending
}

impl Exec {
    fn refuse_labels(&self) -> anyhow::Result<()> {
        let labels = [
            ("apparmor", self.apparmor.as_deref(), "AppArmor"),
            ("process-label", self.process_label.as_deref(), "SELinux"),
        ];
        for (option, label, module) in labels {
            if let Some(label) = label.filter(|label| !label.is_empty()) {
                bail!("--{option}={label}: the guest's kernel has no {module}: leave it out");
            }
        }
        if let Some(path) = self.cgroup.iter().find(|path| !path.is_empty()) {
            bail!("--cgroup={path}: a container's guest has no other cgroups: leave it out");
        }
        Ok(())
    }

    /// The process to execute.
    fn program(&self, container: &Container) -> anyhow::Result<Program> {
        let own: Value = request::fetch(container, Request::Process)?;
        if let Some(path) = &self.process {
            return Ok(Program::load(path, &own)?);
        }
        Ok(Program::derive(
            own,
            Changes {
                args: self.command.clone(),
                cwd: self.cwd.clone(),
                env: self.env.clone(),
                terminal: self.tty,
                no_new_privileges: self.no_new_privs,
                user: self.user.map(|user| (user.uid, user.gid)),
                additional_gids: self.additional_gids.clone(),
                capabilities: self.cap.clone(),
            },
        )?)
    }
}
