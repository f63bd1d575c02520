//! `kiln state`: what a container is now, in the runtime specification's words.

use std::collections::HashMap;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use serde::Serialize;

use super::Global;
use crate::state::{self, Container, Status};

/// Options of `kiln state`.
#[derive(Debug, clap::Args)]
pub struct State {
    /// The container's id
    id: String,
}

/// A container as `state` and `list` show it: the specification's fields and runc's own.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Shown<'a> {
    oci_version: &'a str,
    /// The container's id.
    pub id: &'a str,
    /// The process that stands for it, 0 once it has stopped.
    pub pid: i32,
    /// How far it is.
    pub status: &'static str,
    /// The bundle's directory.
    pub bundle: &'a Path,
    rootfs: &'a Path,
    /// When it was made.
    pub created: &'a str,
    #[serde(skip_serializing_if = "HashMap::is_empty")]
    annotations: &'a HashMap<String, String>,
    /// Who made it.
    pub owner: &'a str,
}

impl<'a> Shown<'a> {
    /// A container as it is now.
    pub fn new(container: &'a Container) -> Self {
        let (record, status) = (&container.record, container.status());
        Self {
            oci_version: &record.oci_version,
            id: &record.id,
            pid: if status == Status::Stopped { 0 } else { record.monitor.pid },
            status: status.name(),
            bundle: &record.bundle,
            rootfs: &record.rootfs,
            created: &record.created,
            annotations: &record.annotations,
            owner: &record.owner,
        }
    }
}

/// Prints the container's state as JSON.
pub fn run(global: &Global, state: &State) -> anyhow::Result<ExitCode> {
    let container = state::find(&global.root, &state.id)?;
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &Shown::new(&container))?;
    // As runc, without a line's end.
    out.flush()?;
    Ok(ExitCode::SUCCESS)
}
