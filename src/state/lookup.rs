//! Containers as a command finds them.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use super::directory::StateError;
use super::record::{Record, Status};
use crate::bundle;

/// A container of the state directory.
#[derive(Debug)]
pub struct Container {
    /// What is remembered of it.
    pub record: Record,
    path: PathBuf,
}

/// Finds a container by its id.
///
/// # Errors
/// There is none, or its record can't be read.
pub fn find(root: &Path, id: &str) -> Result<Container, StateError> {
    let unknown = || StateError::Unknown { id: id.to_owned() };
    if bundle::validate_id(id).is_err() {
        return Err(unknown());
    }
    let path = root.join(id);
    let file = path.join("state.json");
    let text = match fs::read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound && path.is_dir() => {
            return Err(StateError::Nameless { id: id.to_owned(), path });
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unknown()),
        Err(source) => return Err(StateError::Io { path: file, source }),
    };
    match serde_json::from_slice(&text) {
        Ok(record) => Ok(Container { record, path }),
        Err(source) => Err(StateError::Damaged { id: id.to_owned(), path: file, source }),
    }
}

/// All containers, by their ids' order. What can't be read is left out, with a warning.
///
/// # Errors
/// The directory can't be read; that it isn't there is no error.
pub fn all(root: &Path) -> Result<Vec<Container>, StateError> {
    let at = |source| StateError::Io { path: root.to_owned(), source };
    let entries = match fs::read_dir(root) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at(error)),
    };
    let mut containers = Vec::new();
    for entry in entries {
        let name = entry.map_err(at)?.file_name();
        let Some(id) = name.to_str() else { continue };
        match find(root, id) {
            Ok(container) => containers.push(container),
            // It has gone meanwhile, or isn't one.
            Err(StateError::Unknown { .. } | StateError::Nameless { .. }) => {}
            Err(error) => tracing::warn!(id, "{:#}", anyhow::Error::new(error)),
        }
    }
    containers.sort_by(|a, b| a.record.id.cmp(&b.record.id));
    Ok(containers)
}

impl Container {
    /// What it is now.
    pub fn status(&self) -> Status {
        if self.record.monitor.is_alive() { self.record.status } else { Status::Stopped }
    }

    /// The directory, opened: names below it are short however long its own path is.
    ///
    /// # Errors
    /// It has gone.
    pub fn open(&self) -> io::Result<OwnedFd> {
        Ok(fs::File::open(&self.path)?.into())
    }

    /// A name for an entry of the opened directory that fits into a socket's address.
    pub fn short_name(directory: &OwnedFd, entry: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{entry}", directory.as_raw_fd()))
    }
}
