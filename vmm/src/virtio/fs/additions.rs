//! Trees that come to a share while it is served, and go: those of a pod's further containers.
//!
//! The process that serves has given up what mounting takes. So another one does it, the monitor: it
//! takes over what is to be added in the mount namespace in which that has a path, as the process
//! itself did at its start, and enters that process's mount namespace for as long as it takes to mount
//! it there. A thread of its own is needed for it, since the whole process would have to have but one
//! thread otherwise.
//!
//! # Trust
//! The process that serves may be in the guest's hands. It can't change its mounts, and the tree's
//! tmpfs is read-only to it: the places are what was made here. Nothing is opened by a path that leads
//! through what the guest may write.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use rustix::fs::{AtFlags, Mode, OFlags, open, unlinkat};
use rustix::mount::{OpenTreeFlags, UnmountFlags, open_tree, unmount};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::tree::{
    Attributes, Place, Share, TreeError, make_place, mount_share, set_attributes, step,
};

/// The tree of a process that serves it.
#[derive(Debug)]
pub struct Served {
    /// A pidfd of the process.
    process: OwnedFd,
}

/// Moves the calling thread, which must not be its process's first, into another mount namespace: that
/// of a process, by a pidfd, or one by its own descriptor. Paths are those of that namespace then.
///
/// # Errors
/// The process has ended, or the caller has no right to.
pub fn enter_mount_namespace(namespace: BorrowedFd<'_>) -> Result<(), TreeError> {
    // SAFETY: no file descriptor table is unshared.
    let own_root = unsafe { unshare_unsafe(UnshareFlags::FS) };
    step("have a root directory of its own", own_root)?;
    setns(namespace, CloneFlags::CLONE_NEWNS).map_err(|errno| TreeError::Step {
        what: "enter the mount namespace".to_owned(),
        source: errno.into(),
    })
}

impl Served {
    /// The tree of a process, by its pidfd.
    pub fn by(process: OwnedFd) -> Self {
        Self { process }
    }

    /// Mounts shares on their places, all of them or none. The calling thread, which must not be its
    /// process's first, stays in the tree's mount namespace.
    ///
    /// # Errors
    /// See [`TreeError`].
    pub fn attach(&self, shares: &[Share]) -> Result<(), TreeError> {
        let tree = self.enter()?;
        for (done, share) in shares.iter().enumerate() {
            if let Err(error) = tree.attach(share) {
                let before = shares.iter().take(done);
                before.for_each(|share| drop(tree.detach(share.place)));
                return Err(error);
            }
        }
        Ok(())
    }

    /// Unmounts what is at these places, and removes them. What the guest has open there stays open.
    /// The calling thread is as for [`attach`](Self::attach).
    ///
    /// # Errors
    /// The last that failed.
    pub fn detach(&self, places: &[Place]) -> Result<(), TreeError> {
        let tree = self.enter()?;
        let mut done = Ok(());
        for place in places {
            if let Err(error) = tree.detach(*place) {
                done = Err(error);
            }
        }
        done
    }

    fn enter(&self) -> Result<Tree, TreeError> {
        enter_mount_namespace(self.process.as_fd())?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let top = step("open the tree", open(c"/", flags, Mode::empty()))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        let writable = step("clone the tree's top", open_tree(&top, c"", flags))?;
        let change = Attributes { set: 0, clear: libc::MOUNT_ATTR_RDONLY, propagation: 0 };
        set_attributes(writable.as_fd(), change, 0)
            .map_err(|source| TreeError::Step { what: "open the tree's top".to_owned(), source })?;
        Ok(Tree { top, writable })
    }
}

/// A tree whose mount namespace the calling thread is in.
struct Tree {
    top: OwnedFd,
    /// Its tmpfs again, where the places are made: to the process that serves it is read-only.
    writable: OwnedFd,
}

impl Tree {
    fn attach(&self, share: &Share) -> Result<(), TreeError> {
        make_place(self.writable.as_fd(), share.place)?;
        mount_share(self.top.as_fd(), share).inspect_err(|_| drop(self.remove(share.place)))
    }

    fn detach(&self, place: Place) -> Result<(), TreeError> {
        let path = format!("/{}", place.path());
        let flags = UnmountFlags::DETACH | UnmountFlags::NOFOLLOW;
        step(format!("unmount {path}"), unmount(path.as_str(), flags))?;
        self.remove(place)
    }

    fn remove(&self, place: Place) -> Result<(), TreeError> {
        let path = place.path();
        let flags = if place.is_file() { AtFlags::empty() } else { AtFlags::REMOVEDIR };
        step(format!("remove {path}"), unlinkat(&self.writable, path.as_str(), flags))
    }
}
