//! `kiln resume`: let the processes of a paused container go on.

use std::process::ExitCode;

use anyhow::bail;

use super::{Global, request};
use crate::sandbox::control::Request;
use crate::state::{self, Status};

/// Options of `kiln resume`.
#[derive(Debug, clap::Args)]
pub struct Resume {
    /// The container's id
    id: String,
}

/// Returns once they do.
pub fn run(global: &Global, resume: &Resume) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &resume.id)?;
    if container.status() != Status::Paused {
        bail!("container not paused");
    }
    request::perform(&container, Request::Resume, &[])
}
