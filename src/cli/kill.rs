//! `kiln kill`: send a signal to a container's processes.

use std::process::ExitCode;

use anyhow::anyhow;

use super::Global;
use super::request::{self, not_running};
use crate::sandbox::control::Request;
use crate::signal;
use crate::state::{self, Status};

/// Options of `kiln kill`.
#[derive(Debug, clap::Args)]
pub struct Kill {
    /// Send it to all of the container's processes
    #[arg(short, long)]
    all: bool,
    /// The container's id
    id: String,
    /// The signal's number, or its name with or without SIG
    #[arg(default_value = "SIGTERM", allow_hyphen_values = true)]
    signal: String,
}

/// Sends the signal.
pub fn run(global: &Global, kill: &Kill) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &kill.id)?;
    if kill.signal == "0" && container.status() != Status::Stopped {
        // kill(2)'s question whether there is somebody.
        return Ok(ExitCode::SUCCESS);
    }
    let signal = signal::parse(&kill.signal).map_err(|error| anyhow!(error))?;
    if container.status() == Status::Stopped {
        // runc's answer: with --all it is no error that nothing is left.
        return if kill.all { Ok(ExitCode::SUCCESS) } else { Err(not_running().into()) };
    }
    request::perform(&container, Request::Signal { signal, all: kill.all }, &[])
}
