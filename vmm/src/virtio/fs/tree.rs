//! The file tree that a guest is given, in a mount namespace that holds nothing else.
//!
//! The tree's top is a tmpfs of a few entries, read-only once it is built: `rootfs/` and
//! `mounts/<index>`, each the top of a clone of what the monitor opened, and `containers/` and
//! `volumes/` for [what comes later](super::additions). Clones are detached first,
//! in the namespace that the sources belong to, and then moved into a new namespace, whose root the
//! tmpfs becomes. The host's mounts are gone from there: no path and no `..` leads out.
//!
//! On each clone, and on all that is mounted below it:
//! * mounts and unmounts don't propagate, either way: the tree is as it was at the start;
//! * devices can't be opened and symbolic links aren't followed by the host's kernel, so that a
//!   mistake in the server can't turn a node or link that the guest made into the host's;
//! * nothing can be executed from it, and set-id bits mean nothing to the host here.
//!
//! None of these shows in the guest, whose kernel does all of that itself.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, mkdirat, open, openat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// Why the tree could not be built.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// A share could not be cloned.
    #[error("cannot take {what} over; was it opened in this process's mount namespace?")]
    Clone {
        /// Which share.
        what: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Two shares have one place.
    #[error("two mounts have the index {0}: each index may be used once")]
    TwiceTheIndex(u32),
    /// Two additions have one place.
    #[error("{0} is there already")]
    TwiceThePlace(String),
    /// An index that has no room in a node id.
    #[error("mount {0}: an index may be at most {max}", max = super::MAX_MOUNT_INDEX)]
    LargeIndex(u32),
    /// Any other step.
    #[error("cannot {what}")]
    Step {
        /// What was being done.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

pub(super) fn step<T>(
    what: impl Into<String>,
    result: rustix::io::Result<T>,
) -> Result<T, TreeError> {
    result.map_err(|errno| TreeError::Step { what: what.into(), source: errno.into() })
}

/// A share to be: a detached clone of a host's tree.
#[derive(Debug)]
pub struct Share {
    pub(super) clone: OwnedFd,
    pub(super) place: Place,
}

/// Where a share is found in the tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// `rootfs`
    Rootfs,
    /// `mounts/<index>`
    Mount {
        /// The index.
        index: u32,
        /// A file rather than a directory.
        is_file: bool,
    },
    /// `containers/<number>`: a further container's root file system.
    Container {
        /// The number, below [`ADDITIONS`](super::ADDITIONS).
        number: u16,
    },
    /// `volumes/<number>`: what a further container mounts.
    Volume {
        /// The number, below [`ADDITIONS`](super::ADDITIONS).
        number: u16,
        /// A file rather than a directory.
        is_file: bool,
    },
}

impl Place {
    /// Its path in the tree.
    pub fn path(self) -> String {
        match self {
            Self::Rootfs => "rootfs".to_owned(),
            Self::Mount { index, .. } => format!("mounts/{index}"),
            Self::Container { number } => format!("containers/{number}"),
            Self::Volume { number, .. } => format!("volumes/{number}"),
        }
    }

    /// A file is there, not a directory.
    pub fn is_file(self) -> bool {
        match self {
            Self::Mount { is_file, .. } | Self::Volume { is_file, .. } => is_file,
            Self::Rootfs | Self::Container { .. } => false,
        }
    }
}

/// How a share is cloned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShareOptions {
    /// Writing to it fails with `EROFS`.
    pub read_only: bool,
    /// With what is mounted below it.
    pub recursive: bool,
}

impl Share {
    /// Clones `source`. The process must still be in the mount namespace in which `source` was
    /// opened.
    ///
    /// # Errors
    /// [`TreeError::Clone`].
    pub fn new(
        source: BorrowedFd<'_>,
        place: Place,
        options: ShareOptions,
    ) -> Result<Self, TreeError> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_EMPTY_PATH;
        if options.recursive {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let clone = open_tree(source, c"", flags);
        let clone = clone.map_err(|error| TreeError::clone(place, error.into()))?;
        Self::of_mount(clone, place, options)
    }

    /// Takes a mount that is nowhere yet.
    ///
    /// # Errors
    /// [`TreeError::Clone`].
    pub fn of_mount(
        mount: OwnedFd,
        place: Place,
        options: ShareOptions,
    ) -> Result<Self, TreeError> {
        harden(mount.as_fd(), options.read_only).map_err(|error| TreeError::clone(place, error))?;
        Ok(Self { clone: mount, place })
    }
}

impl TreeError {
    fn clone(place: Place, source: io::Error) -> Self {
        let what = match place {
            Place::Rootfs => "the root file system".to_owned(),
            Place::Mount { index, .. } => format!("mount {index}"),
            Place::Container { .. } | Place::Volume { .. } => place.path(),
        };
        Self::Clone { what, source }
    }
}

/// Restricts a share's mount and all below it, and takes them out of their peer groups.
fn harden(mount: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let mut set = libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NOEXEC
        | libc::MOUNT_ATTR_NOSYMFOLLOW;
    if read_only {
        set |= libc::MOUNT_ATTR_RDONLY;
    }
    let attributes = Attributes { set, clear: 0, propagation: libc::MS_PRIVATE };
    set_attributes(mount, attributes, libc::AT_RECURSIVE)
}

/// What `mount_setattr(2)` changes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// A propagation, or 0 for none.
    pub propagation: u64,
}

/// `mount_setattr(2)` of a mount.
pub(super) fn set_attributes(
    mount: BorrowedFd<'_>,
    Attributes { set, clear, propagation }: Attributes,
    flags: libc::c_int,
) -> io::Result<()> {
    let attributes = libc::mount_attr { attr_set: set, attr_clr: clear, propagation, userns_fd: 0 };
    // SAFETY: the path is a C string and the structure has the size that is given with it.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Enters a new mount namespace whose root is the tree of `shares`. The calling process must have a
/// single thread and `CAP_SYS_ADMIN`. Gives what the file system server needs of `/proc` from then on:
/// `/proc/self/fd`, in a mount that holds nothing else of it.
///
/// # Errors
/// See [`TreeError`]. What has been done by then is not undone: the process can only end.
pub fn enter(shares: &[Share]) -> Result<File, TreeError> {
    // SAFETY: only namespaces are unshared; file descriptors stay shared with nobody as before.
    let unshared = unsafe { unshare_unsafe(UnshareFlags::NEWNS) };
    step("make a mount namespace", unshared)?;
    let proc_self = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc_self = step("open /proc/self", open(c"/proc/self", proc_self, Mode::empty()))?;
    let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let fd_directory = step("take /proc/self/fd over", open_tree(&proc_self, c"fd", clone))?;

    let top = build(shares)?;

    step("enter the tree", fchdir(&top))?;
    step("make the tree the root", pivot_root(c".", c"."))?;
    step("leave the old root", unmount(c".", UnmountFlags::DETACH))?;
    step("change to the root", chdir(c"/"))?;
    Ok(fd_directory.into())
}

/// Builds the tree in a tmpfs and mounts that over `/proc`, the one directory that is there on every
/// host; the directory it is mounted on is of no further consequence.
fn build(shares: &[Share]) -> Result<OwnedFd, TreeError> {
    let private = MountPropagationFlags::REC | MountPropagationFlags::PRIVATE;
    step("make mounts private", mount_change(c"/", private))?;
    let context = step("make a tmpfs", fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC))?;
    step("size the tmpfs", fsconfig_set_string(&context, c"size", c"1m"))?;
    step("set the tmpfs' mode", fsconfig_set_string(&context, c"mode", c"0755"))?;
    step("make the tmpfs", fsconfig_create(&context))?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    let top = step("make the tmpfs' mount", fsmount(&context, flags, MountAttrFlags::empty()))?;
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    step("mount the tmpfs", move_mount(&top, c"", CWD, c"/proc", attach))?;

    let mode = Mode::from_raw_mode(0o755);
    step("make rootfs/", mkdirat(&top, c"rootfs", mode))?;
    step("make mounts/", mkdirat(&top, c"mounts", mode))?;
    step("make containers/", mkdirat(&top, c"containers", mode))?;
    step("make volumes/", mkdirat(&top, c"volumes", mode))?;
    for share in shares {
        attach_share(top.as_fd(), share)?;
    }
    let sealed = libc::MOUNT_ATTR_RDONLY
        | libc::MOUNT_ATTR_NODEV
        | libc::MOUNT_ATTR_NOSUID
        | libc::MOUNT_ATTR_NOEXEC;
    // The tmpfs alone: what is mounted in it has its own.
    let sealed = Attributes { set: sealed, clear: 0, propagation: 0 };
    let sealed = set_attributes(top.as_fd(), sealed, 0);
    sealed.map_err(|source| TreeError::Step { what: "seal the tree".to_owned(), source })?;
    Ok(top)
}

fn attach_share(top: BorrowedFd<'_>, share: &Share) -> Result<(), TreeError> {
    if share.place != Place::Rootfs {
        make_place(top, share.place)?;
    }
    mount_share(top, share)
}

/// Makes the file or directory that a share is mounted on.
pub(super) fn make_place(top: BorrowedFd<'_>, place: Place) -> Result<(), TreeError> {
    let path = place.path();
    let made = if place.is_file() {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        openat(top, path.as_str(), flags, Mode::from_raw_mode(0o644)).map(drop)
    } else {
        mkdirat(top, path.as_str(), Mode::from_raw_mode(0o755))
    };
    match (made, place) {
        (Err(Errno::EXIST), Place::Mount { index, .. }) => Err(TreeError::TwiceTheIndex(index)),
        (Err(Errno::EXIST), _) => Err(TreeError::TwiceThePlace(path)),
        (made, _) => step(format!("make a place for {path}"), made),
    }
}

/// Mounts a share on its place.
pub(super) fn mount_share(top: BorrowedFd<'_>, share: &Share) -> Result<(), TreeError> {
    let path = share.place.path();
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    let moved = move_mount(&share.clone, c"", top, path.as_str(), attach);
    step(format!("mount {path}; is what it shares a file where a file is said to be"), moved)
}
