//! `kiln start`: execute the program of a created container.

use std::process::ExitCode;

use super::{Global, delete, request};
use crate::hooks;
use crate::sandbox::control::Request;
use crate::state::{self, Container, Status};

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
    request::perform(&container, Request::Start, &[])?;
    run_hooks(&container)
}

/// Runs the hooks that come after the start. If one fails, the container is stopped.
fn run_hooks(container: &Container) -> anyhow::Result<ExitCode> {
    let (record, monitor) = (&container.record, container.record.monitor);
    let state = hooks::state_of(record, Status::Running, u32::try_from(monitor.pid).ok());
    if let Err(error) = hooks::run("poststart", &record.hooks.poststart, &state) {
        delete::kill(monitor)?;
        return Err(error.into());
    }
    Ok(ExitCode::SUCCESS)
}
