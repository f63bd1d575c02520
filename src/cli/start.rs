//! `kiln start`: execute the program of a created container.

use std::process::ExitCode;

use super::{Global, Reported};
use crate::sandbox::control::{self, Reply, Request};
use crate::state::{self, Status};

/// Options of `kiln start`.
#[derive(Debug, clap::Args)]
pub struct Start {
    /// The container's id
    id: String,
}

/// Returns once the program runs.
pub fn run(global: &Global, start: &Start) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &start.id)?;
    if container.status() == Status::Stopped {
        anyhow::bail!("cannot start a container that has stopped");
    }
    match control::ask(&container, Request::Start)? {
        Reply::Done => Ok(ExitCode::SUCCESS),
        Reply::Failed { message, .. } => Err(Reported { exit_code: 1, error: message }.into()),
    }
}
