//! A sandbox's directory below `--root`: its lock, its state, and sockets for as long as it takes
//! to connect them.
//!
//! `<root>/<id>/lock` is locked (`flock`) by whoever stands for the sandbox; the lock is handed from
//! the command to the monitor and goes with the last of them. A directory whose lock is free is a
//! stopped container's, or what a crash left of one that nobody could ask for any more: only the
//! latter is taken over. `state.json` is replaced atomically, so that readers need no lock, and room
//! for its next version is kept beside it.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{Mode, fstatat};
use nix::unistd::{UnlinkatFlags, unlinkat};

use super::record::{Record, Status};

/// Mode of the directory and of what is in it: nobody else's business.
const PRIVATE: u32 = 0o700;
const STATE: &str = "state.json";
/// What becomes `state.json`.
const NEW: &str = "state.json.new";
/// What takes as much room as `state.json`, to be given up for its next version on a full disk.
const SPARE: &str = "state.json.spare";

/// The directory, locked.
#[derive(Debug)]
pub struct StateDir {
    path: PathBuf,
    /// The directory, wherever this process's root is by now.
    directory: File,
    lock: File,
}

/// Why there is no directory for a sandbox.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another sandbox has the id.
    #[error("container with given ID already exists: {id}: choose another id, or delete it")]
    Taken {
        /// The id.
        id: String,
    },
    /// No sandbox has the id.
    #[error("container does not exist: {id:?}")]
    Unknown {
        /// The id.
        id: String,
    },
    /// A command was killed before it could say what the directory is for.
    #[error("{} holds no container yet: if nobody is about to make one, remove it with delete --force {id}", .path.display())]
    Nameless {
        /// The id.
        id: String,
        /// The directory.
        path: PathBuf,
    },
    /// What is remembered of a container can't be read.
    #[error(
        "{} is damaged: remove what is left of the container with delete --force {id}", .path.display()
    )]
    Damaged {
        /// The id.
        id: String,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: serde_json::Error,
    },
    /// Whoever stands for the sandbox has not let go of it.
    #[error("container {id:?} is in use by another command: try again")]
    Busy {
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
            let (directory, lock) = match open_with_lock(&path) {
                Ok(opened) => opened,
                // Its last owner has just removed the directory.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    // Spares whoever has a file there.
                    let _ = fs::remove_dir(&path);
                    return Err(at(&lock_path)(error));
                }
            };
            match lock.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(StateError::Taken { id: id.to_owned() });
                }
                Err(fs::TryLockError::Error(error)) => return Err(at(&lock_path)(error)),
            }
            let dir = Self { path: path.clone(), directory, lock };
            if !dir.is_current() {
                continue;
            }
            if dir.holds_container() {
                return Err(StateError::Taken { id: id.to_owned() });
            }
            dir.clear_up().map_err(at(&path))?;
            return Ok(dir);
        }
    }

    /// Locks the directory of a container for which nobody stands any more, waiting for at most
    /// `patience`.
    ///
    /// # Errors
    /// There is none, or somebody still has the lock.
    pub fn seize(root: &Path, id: &str, patience: Duration) -> Result<Self, StateError> {
        const STEP: Duration = Duration::from_millis(5);

        let path = root.join(id);
        let lock_path = path.join("lock");
        let unknown = || StateError::Unknown { id: id.to_owned() };
        let lock = match OpenOptions::new().write(true).open(&lock_path) {
            Ok(lock) => lock,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A crash between making the directory and its lock.
                let _ = fs::remove_dir(&path);
                return Err(unknown());
            }
            Err(source) => return Err(StateError::Io { path: lock_path, source }),
        };
        let deadline = Instant::now() + patience;
        loop {
            match lock.try_lock() {
                Ok(()) => break,
                Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(STEP);
                }
                Err(fs::TryLockError::WouldBlock) => {
                    return Err(StateError::Busy { id: id.to_owned() });
                }
                Err(fs::TryLockError::Error(source)) => {
                    return Err(StateError::Io { path: lock_path, source });
                }
            }
        }
        let directory = match File::open(&path) {
            Ok(directory) => directory,
            // Whoever had the lock has removed it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(unknown()),
            Err(source) => return Err(StateError::Io { path, source }),
        };
        let dir = Self { path, directory, lock };
        if dir.is_current() { Ok(dir) } else { Err(unknown()) }
    }

    /// The directory whose lock another process of the sandbox has handed over.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn inherit(path: PathBuf, lock: OwnedFd) -> io::Result<Self> {
        Ok(Self { directory: File::open(&path)?, path, lock: File::from(lock) })
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

    /// Replaces `state.json`. Room for the next version is kept, so that a disk that fills up while the
    /// container lives does not end it: where there is none, no container is made.
    ///
    /// # Errors
    /// The file system refuses; the old state is still there then.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        let text = serde_json::to_vec(record)?;
        if let Err(error) = self.put(NEW, &text) {
            // Without a spare there is nothing to be had by trying again.
            unlinkat(&self.directory, SPARE, UnlinkatFlags::NoRemoveDir).map_err(|_| error)?;
            self.put(NEW, &text)?;
        }
        renameat(&self.directory, NEW, &self.directory, STATE)?;
        let spared = self.keep_spare(&text);
        if record.status == Status::Creating { spared } else { Ok(()) }
    }

    fn put(&self, name: &str, text: &[u8]) -> io::Result<()> {
        let flags = OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        File::from(openat(&self.directory, name, flags, mode)?).write_all(text)
    }

    fn keep_spare(&self, text: &[u8]) -> io::Result<()> {
        let found = fstatat(&self.directory, SPARE, AtFlags::AT_SYMLINK_NOFOLLOW);
        let length = found.ok().and_then(|found| usize::try_from(found.st_size).ok());
        match length.is_some_and(|length| length >= text.len()) {
            true => Ok(()),
            false => self.put(SPARE, text),
        }
    }

    /// A listening `SOCK_SEQPACKET` socket in the directory.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn listen(&self, name: &str) -> io::Result<OwnedFd> {
        use nix::sys::socket::{
            AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
        };

        let dir = File::open(&self.path)?;
        let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let listener = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(&path)?)?;
        listen(&listener, Backlog::MAXCONN)?;
        Ok(listener)
    }

    /// A listening socket and a connection to it, which nobody else can connect to any more.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn private_socket(&self) -> io::Result<(UnixListener, UnixStream)> {
        self.bind_for_a_moment(|name| UnixStream::connect(name))
    }

    /// A listening socket and its address, an `O_PATH` descriptor: who has that one can connect by its
    /// name in /proc, whichever user it is, and nobody else.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn private_listener(&self) -> io::Result<(UnixListener, OwnedFd)> {
        self.bind_for_a_moment(|name| {
            fs::set_permissions(name, fs::Permissions::from_mode(0o666))?;
            let flags = libc::O_PATH | libc::O_CLOEXEC;
            Ok(File::options().read(true).custom_flags(flags).open(name)?.into())
        })
    }

    /// A listening socket, and what `take` makes of its name as long as it has one.
    fn bind_for_a_moment<T>(
        &self,
        take: impl FnOnce(&Path) -> io::Result<T>,
    ) -> io::Result<(UnixListener, T)> {
        // The name in /proc is short however long the path is; a socket's may have 108 bytes.
        let dir = File::open(&self.path)?;
        let name = PathBuf::from(format!("/proc/self/fd/{}/socket", dir.as_raw_fd()));
        let listener = UnixListener::bind(&name)?;
        let taken = take(&name);
        fs::remove_file(&name)?;
        Ok((listener, taken?))
    }

    /// Removes what the sandbox has on the host, and the directory, and gives the lock up. Does
    /// nothing if that has been done.
    ///
    /// # Errors
    /// The file system refuses, or a process of the sandbox does not end.
    pub fn remove(self) -> io::Result<()> {
        if !self.is_current() {
            return Ok(());
        }
        self.clear_up()?;
        // The lock's file goes last, so that until then the id stays taken.
        fs::remove_file(self.path.join("lock"))?;
        self.remove_name()
    }

    /// Removes the directory, whose lock's file has gone: from then on it is anybody's.
    fn remove_name(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            // Somebody else has the id by now, or has had it.
            Err(error)
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOTEMPTY | libc::EEXIST | libc::ENOENT)
                ) =>
            {
                Ok(())
            }
            removed => removed,
        }
    }

    /// As [`remove`](Self::remove), if it isn't a container's that stays until it is deleted: says
    /// whether it is gone.
    ///
    /// # Errors
    /// The file system refuses.
    pub fn remove_unless_kept(self) -> io::Result<bool> {
        // If the lock is no longer its own, what the directory holds is a successor's.
        if self.is_current() && self.holds_container() {
            return Ok(false);
        }
        self.remove().map(|()| true)
    }

    /// Whether the lock is still that of the directory of this name.
    fn is_current(&self) -> bool {
        let Ok(named) = fs::symlink_metadata(self.path.join("lock")) else { return false };
        let Ok(held) = self.lock.metadata() else { return false };
        (named.dev(), named.ino()) == (held.dev(), held.ino())
    }

    /// Whether it is a container's that stays until it is deleted. One that can't be read may be.
    fn holds_container(&self) -> bool {
        match fs::read(self.path.join(STATE)) {
            Ok(text) => serde_json::from_slice::<Record>(&text)
                .is_ok_and(|record| record.kept && record.status != Status::Creating),
            Err(error) => error.kind() != io::ErrorKind::NotFound,
        }
    }

    /// What was written down last.
    pub fn record(&self) -> Option<Record> {
        serde_json::from_slice(&fs::read(self.path.join(STATE)).ok()?).ok()
    }

    /// Removes everything but the lock, and what it says there is elsewhere on the host.
    fn clear_up(&self) -> io::Result<()> {
        if let Some(record) = self.record() {
            record.cgroup.remove()?;
            // By now no process holds a tap.
            if let Some(network) = record.network {
                network.tidy();
            }
        }
        for entry in fs::read_dir(&self.path)? {
            let entry = entry?;
            if entry.file_name() != "lock" {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

/// Opens a directory, and its lock, which is made if it isn't there.
fn open_with_lock(path: &Path) -> io::Result<(File, File)> {
    let directory = File::open(path)?;
    let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
    let lock = openat(&directory, "lock", flags, Mode::S_IRUSR | Mode::S_IWUSR)?;
    Ok((directory, File::from(lock)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::HostHooks;
    use std::io::Read;

    #[test]
    fn id_is_taken_until_the_last_holder_of_the_lock_is_gone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let first = StateDir::create(root.path(), "a").expect("free");
        let shared = StateDir::inherit(first.path().to_owned(), first.share_lock().expect("dup"));
        let shared = shared.expect("there");
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
        let monitor = monitor.expect("there");
        monitor.remove().expect("removed");
        let successor = StateDir::create(root.path(), "a").expect("free again");
        command.remove().expect("nothing to do");
        assert!(successor.path().join("lock").exists());
    }

    /// What says that a container stays until it is deleted.
    fn kept() -> Vec<u8> {
        let record = serde_json::json!({
            "ociVersion": "1.2.0", "id": "a", "status": "created",
            "monitor": {"pid": 1, "started": 0}, "bundle": "/b", "rootfs": "/b/rootfs",
            "created": "", "owner": "", "annotations": {}, "engine": "kvm", "kept": true,
            "cgroup": {"directories": [], "unit": null}, "hooks": HostHooks::default(),
        });
        serde_json::to_vec(&record).expect("JSON")
    }

    #[test]
    fn id_may_be_used_again_before_its_directory_has_gone() {
        let root = tempfile::tempdir().expect("temporary directory");
        let dir = StateDir::create(root.path(), "a").expect("free");
        fs::remove_file(dir.path().join("lock")).expect("removed");
        let successor = StateDir::create(root.path(), "a").expect("free");
        dir.remove_name().expect("a successor's");
        assert!(successor.is_current());
        successor.remove().expect("removed");
        dir.remove_name().expect("gone");
    }

    #[test]
    fn what_a_successor_keeps_is_not_taken_for_ones_own() {
        let root = tempfile::tempdir().expect("temporary directory");
        let dir = StateDir::create(root.path(), "a").expect("free");
        let monitor = StateDir::inherit(dir.path().to_owned(), dir.share_lock().expect("dup"));
        monitor.expect("there").remove().expect("removed");
        let successor = StateDir::create(root.path(), "a").expect("free again");
        fs::write(successor.path().join(STATE), kept()).expect("written");
        assert!(successor.holds_container());
        assert!(dir.remove_unless_kept().expect("nothing to do"));
        assert!(successor.path().join(STATE).exists());
        assert!(!successor.remove_unless_kept().expect("nothing to do"));
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
        let (listener, address) = dir.private_listener().expect("listens");
        let name = format!("/proc/self/fd/{}", address.as_raw_fd());
        UnixStream::connect(name).expect("connects").write_all(b"y").expect("writes");
        let (mut server, _) = listener.accept().expect("accepts");
        server.read_exact(&mut byte).expect("reads");
        assert_eq!((byte, fs::read_dir(dir.path()).expect("readable").count()), (*b"y", 1));
    }
}
