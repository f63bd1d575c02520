//! `kiln pause`: have all processes of a container stand still.

use std::process::ExitCode;

use super::Global;
use super::request::{self, not_running};
use crate::sandbox::control::Request;
use crate::state::{self, Status};

/// Options of `kiln pause`.
#[derive(Debug, clap::Args)]
pub struct Pause {
    /// The container's id
    id: String,
}

/// Returns once they do.
pub fn run(global: &Global, pause: &Pause) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &pause.id)?;
    match container.status() {
        Status::Created | Status::Running => request::perform(&container, Request::Pause, &[]),
        Status::Creating | Status::Paused | Status::Stopped => Err(not_running().into()),
    }
}
