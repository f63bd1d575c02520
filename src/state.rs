//! A sandbox's directory below `--root`: its lock, its state, and sockets for as long as it takes
//! to connect them.
//!
//! `<root>/<id>/lock` is locked (`flock`) by whoever stands for the sandbox; the lock is handed from
//! the command to the monitor and goes with the last of them. A directory whose lock is free is
//! what a crash left: it is taken over. `state.json` is replaced atomically, so that readers need
//! no lock.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Mode of the directory and of what is in it: nobody else's business.
const PRIVATE: u32 = 0o700;

/// The directory, locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    lock: File,
}

/// What `state.json` says, in the terms of the OCI runtime specification.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct State {
    /// Version of the specification.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// How far it is.
    pub status: Status,
    /// The monitor's process id.
    pub pid: u32,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The engine in use.
    pub engine: String,
}

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its sandbox is being made.
    Creating,
    /// Its program runs.
    Running,
}

/// Why there is no directory for a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another sandbox has the id.
    #[error("container with id {id} exists already: choose another id, or wait for its end")]
    Taken {
        /// The id.
        id: String,
    },
    /// The file system.
    #[error("state directory {}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl StateDir {
    /// Makes the directory of a new sandbox. `id` has been validated.
    ///
    /// # Errors
    /// The id is taken, or the file system refuses.
    pub fn create(root: &Path, id: &str) -> Result<Self, StateError> {
        let path = root.join(id);
        let at = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { path, source }
        };
        DirBuilder::new().recursive(true).mode(0o711).create(root).map_err(at(root))?;
        let lock_path = path.join("lock");
        loop {
            match DirBuilder::new().mode(PRIVATE).create(&path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                    return Err(at(&path)(error));
                }
                Ok(()) | Err(_) => {}
            }
            let opened = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&lock_path);
            let lock = match opened {
                Ok(lock) => lock,
                // Its last owner has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(at(&lock_path)(error)),
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(StateError::Taken { id: id.to_owned() });
                }
                Err(fs::TryLockError::Error(error)) => return Err(at(&lock_path)(error)),
            }
            let dir = Self { path: path.clone(), lock };
            if dir.is_current() {
                dir.clear().map_err(at(&path))?;
                return Ok(dir);
            }
        }
    }

    /// The directory whose lock another process of the sandbox has handed over.
    pub fn inherit(path: PathBuf, lock: OwnedFd) -> Self {
        Self { path, lock: File::from(lock) }
    }

    /// A second descriptor of the lock, to hand over.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn share_lock(&self) -> io::Result<OwnedFd> {
        self.lock.as_fd().try_clone_to_owned()
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Replaces `state.json`.
    ///
    /// # Errors
    /// The file system refuses; the old state is still there then.
    pub fn write(&self, state: &State) -> io::Result<()> {
        let new = self.path.join("state.json.new");
        fs::write(&new, serde_json::to_vec(state)?)?;
        fs::rename(new, self.path.join("state.json"))
    }

    /// A listening socket and a connection to it, which nobody else can connect to any more.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn private_socket(&self) -> io::Result<(UnixListener, UnixStream)> {
        // The name in /proc is short however long the path is; a socket's may have 108 bytes.
        let dir = File::open(&self.path)?;
        let name = PathBuf::from(format!("/proc/self/fd/{}/socket", dir.as_raw_fd()));
        let listener = UnixListener::bind(&name)?;
        let connection = UnixStream::connect(&name);
        fs::remove_file(&name)?;
        Ok((listener, connection?))
    }

    /// Removes the directory and gives the lock up. Does nothing if that has been done.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove(self) -> io::Result<()> {
        if !self.is_current() {
            return Ok(());
        }
        self.clear()?;
        // The lock's file goes last, so that until then the id stays taken.
        fs::remove_file(self.path.join("lock"))?;
        fs::remove_dir(&self.path)
    }

    /// Whether the lock is still that of the directory of this name.
    fn is_current(&self) -> bool {
        let Ok(named) = fs::symlink_metadata(self.path.join("lock")) else { return false };
        let Ok(held) = self.lock.metadata() else { return false };
        (named.dev(), named.ino()) == (held.dev(), held.ino())
    }

    /// Removes everything but the lock.
    fn clear(&self) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name() != "lock" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    #[test]
    fn id_is_taken_until_the_last_holder_of_the_lock_is_gone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let first = StateDir::create(root.path(), "a").expect("free");
        let shared = StateDir::inherit(first.path().to_owned(), first.share_lock().expect("dup"));
        drop(first);
        let error = StateDir::create(root.path(), "a").expect_err("taken");
        assert!(matches!(error, StateError::Taken { .. }));
        shared.remove().expect("removed");
        assert_eq!(fs::read_dir(root.path()).expect("readable").count(), 0);
    }

    #[test]
    fn what_a_crash_left_is_taken_over_empty() {
        let root = tempfile::tempdir().expect("temporary directory");
        let crashed = StateDir::create(root.path(), "a").expect("free");
        fs::write(crashed.path().join("state.json"), "{}").expect("written");
        drop(crashed);
        let dir = StateDir::create(root.path(), "a").expect("stale");
        assert!(!dir.path().join("state.json").exists());
    }

    #[test]
    fn removing_twice_leaves_a_successor_alone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let command = StateDir::create(root.path(), "a").expect("free");
        let monitor =
            StateDir::inherit(command.path().to_owned(), command.share_lock().expect("dup"));
        monitor.remove().expect("removed");
        let successor = StateDir::create(root.path(), "a").expect("free again");
        command.remove().expect("nothing to do");
        assert!(successor.path().join("lock").exists());
    }

    #[test]
    fn private_sockets_are_connected_and_leave_no_name() {
        let root = tempfile::tempdir().expect("temporary directory");
        let dir = StateDir::create(root.path(), &"n".repeat(200)).expect("free");
        let (listener, mut client) = dir.private_socket().expect("connects");
        let (mut server, _) = listener.accept().expect("accepts");
        client.write_all(b"x").expect("writes");
        let mut byte = [0];
        server.read_exact(&mut byte).expect("reads");
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    }
}
