//! Mount trees as file descriptors: open_tree(2), fsopen(2), mount_setattr(2), move_mount(2).
//!
//! A mount is made detached, given its attributes, and attached to an already opened directory or
//! file. No step names its target by a path, so none can be redirected.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};

/// Attributes to set and clear on a mount, as `MOUNT_ATTR_*`, and the propagation to give it, as one
/// of `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE` or 0 to leave it as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Attributes {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// Propagation.
    pub propagation: u64,
}

impl Attributes {
    /// Read-only.
    pub const READ_ONLY: Self = Self { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0 };

    /// A propagation type alone.
    pub const fn propagation(propagation: u64) -> Self {
        Self { set: 0, clear: 0, propagation }
    }

    /// Adds attributes to set; a later choice overrules an earlier one.
    pub fn add(&mut self, set: u64, clear: u64) {
        self.set = (self.set & !clear) | set;
        self.clear = (self.clear & !set) | clear;
        if (set | clear) & libc::MOUNT_ATTR__ATIME != 0 {
            self.clear |= libc::MOUNT_ATTR__ATIME;
        }
    }

    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Changes a mount's attributes, and those of all mounts below it if `recursive`.
///
/// # Errors
/// As mount_setattr(2): `EPERM` for an attribute that a user namespace has locked.
pub fn set_attributes(
    tree: BorrowedFd<'_>,
    attributes: Attributes,
    recursive: bool,
) -> io::Result<()> {
    if attributes.is_empty() {
        return Ok(());
    }
    let argument = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation: attributes.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is a C string and the argument a `struct mount_attr` of the size given, both
    // alive for the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const argument,
            size_of::<libc::mount_attr>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A detached copy of the mount at `source` from there on downwards, with the mounts below it if
/// `recursive`.
///
/// # Errors
/// As open_tree(2): `EINVAL` for a source outside the caller's mount namespace.
pub fn copy(source: BorrowedFd<'_>, recursive: bool) -> io::Result<OwnedFd> {
    let recursive = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    Ok(open_tree(source, c"", flags | recursive)?)
}

/// As [`copy`], from a path.
///
/// # Errors
/// As open_tree(2).
pub fn copy_of_path(source: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let recursive = if recursive { OpenTreeFlags::AT_RECURSIVE } else { OpenTreeFlags::empty() };
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    Ok(open_tree(rustix::fs::CWD, source, flags | recursive)?)
}

/// Attaches a detached mount, or moves an attached one, to `target`.
///
/// # Errors
/// As move_mount(2): `ENOTDIR` where one is a directory and the other isn't.
pub fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, c"", target, c"", flags)?)
}

/// A new file system, mounted detached. A parameter without a value is a flag.
///
/// # Errors
/// As mount(2), with the kernel's own words on parameters where it has any.
pub fn new_file_system(
    kind: &str,
    source: &str,
    parameters: &[(String, Option<String>)],
) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    let explained = |error: rustix::io::Errno| explain(context.as_fd(), error.into());
    fsconfig_set_string(&context, "source", source).map_err(explained)?;
    for (key, value) in parameters {
        match value {
            Some(value) => fsconfig_set_string(&context, key, value),
            None => fsconfig_set_flag(&context, key),
        }
        .map_err(|error| {
            let error = explain(context.as_fd(), error.into());
            io::Error::new(error.kind(), format!("option {key}: {error}"))
        })?;
    }
    fsconfig_create(&context).map_err(explained)?;
    let flags = FsMountFlags::FSMOUNT_CLOEXEC;
    Ok(fsmount(context.as_fd(), flags, MountAttrFlags::empty())?)
}

/// The error with the messages that the kernel left in the file system context, if any.
fn explain(context: BorrowedFd<'_>, error: io::Error) -> io::Error {
    let mut messages = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(length) = rustix::io::read(context, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        messages.push(text.trim_start_matches(|c| "ewi ".contains(c)).trim().to_owned());
    }
    if messages.is_empty() {
        return error;
    }
    io::Error::new(error.kind(), format!("{} ({error})", messages.join("; ")))
}
