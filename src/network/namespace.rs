//! Network namespaces by what they are rather than by a path: what a state file can name.
//!
//! A monitor that is killed leaves interfaces behind that are joined with taps which are no more, in a
//! namespace that its caller may keep. Whoever removes the rest of the sandbox finds it again by its
//! inode number, through whatever holds it: a process in it, or a mount (`ip netns`, engines).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use kiln_netlink::Connection;
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::{Asked, NetworkError, interfaces, redirect};
use crate::procfs;

/// The calling thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// A network namespace. A later one may get the number of one that has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    device: u64,
    inode: u64,
}

impl Namespace {
    /// The one that the calling thread is in.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn here() -> io::Result<Self> {
        Self::of(Path::new(OWN))
    }

    fn of(path: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self { device: metadata.dev(), inode: metadata.ino() })
    }

    /// Takes back what a sandbox that has ended left there: redirections that lead nowhere. What can't
    /// be taken back is told in the log.
    pub fn tidy(self) {
        // A thread may be in a namespace of its own: the caller stays where it is.
        let tidying = std::thread::Builder::new().spawn(move || self.enter_and_tidy());
        match tidying.map(std::thread::JoinHandle::join) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => {
                tracing::warn!(%error, "a redirection stays behind in the network namespace");
            }
            Ok(Err(_)) => tracing::warn!("the network namespace could not be tidied"),
            Err(error) => tracing::warn!(%error, "the network namespace could not be tidied"),
        }
    }

    /// Moves the calling thread there for good.
    fn enter_and_tidy(self) -> Result<(), NetworkError> {
        // One that nobody holds has gone, with its interfaces.
        let Some(path) = self.find() else { return Ok(()) };
        if path != Path::new(OWN) {
            let namespace = File::open(&path);
            let entered = namespace.and_then(|file| Ok(setns(file, CloneFlags::CLONE_NEWNET)?));
            entered.asked(|| format!("network namespace {}", path.display()))?;
        }
        let mut connection = Connection::open().asked(|| "netlink")?;
        for link in interfaces::links(&mut connection)? {
            redirect::remove_left(&mut connection, link.header.index)
                .asked(|| format!("network interface {}", interfaces::name(&link)))?;
        }
        Ok(())
    }

    /// A path that leads there.
    fn find(self) -> Option<PathBuf> {
        let is_it = |path: &PathBuf| Self::of(path).is_ok_and(|found| found == self);
        let own = std::iter::once(PathBuf::from(OWN));
        own.chain(mounted()).chain(of_processes()).find(is_it)
    }
}

/// Where namespaces are mounted, each kind of them.
fn mounted() -> Vec<PathBuf> {
    /// Of the fields of a line of proc_pid_mountinfo(5).
    const MOUNT_POINT: usize = 4;

    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap_or_default();
    let namespaces = mounts.lines().filter(|line| line.contains(" - nsfs "));
    namespaces.filter_map(|line| line.split(' ').nth(MOUNT_POINT)).map(PathBuf::from).collect()
}

fn of_processes() -> impl Iterator<Item = PathBuf> {
    let ids = procfs::ids().into_iter().flatten();
    ids.map(|pid| PathBuf::from(format!("/proc/{pid}/ns/net")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sched::unshare;

    #[test]
    fn a_namespace_is_found_as_long_as_it_is_held() {
        let own = Namespace::here().expect("proc");
        assert_eq!(own.find().as_deref(), Some(Path::new(OWN)));
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            let other = Namespace::here().expect("proc");
            let child = std::process::Command::new("/bin/sleep").arg("1000").spawn();
            (other, child.expect("sleep"))
        });
        let (other, mut child) = thread.join().expect("ends");
        assert_ne!(other, own);
        assert!(other.find().is_some_and(|path| path != Path::new(OWN)));
        other.tidy();
        assert_eq!(Namespace::here().expect("proc"), own);
        child.kill().and_then(|()| child.wait()).expect("ends");
    }
}
