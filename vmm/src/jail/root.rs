//! The root directory of a jailed process.
//!
//! The new root is made the root of the process's own mount namespace, and the old one unmounted
//! from it: nothing outside has a name there any more, and no host mount is kept busy.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, fchdir, pivot_root};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};

use super::error::{During, JailError, checked};

/// Mount attributes (`mount_setattr(2)`) of everything that a jailed process sees.
pub(super) const READ_ONLY: u64 =
    libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV;

/// Keeps what happens to mounts in this (new) mount namespace from the one it was copied from.
///
/// # Errors
/// The kernel refuses: no `CAP_SYS_ADMIN`.
pub fn detach_from_host() -> Result<(), JailError> {
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .during("make the mounts of the namespace private")
}

/// Moves the process into an empty, read-only root. Needs a mount namespace that
/// [was detached](detach_from_host).
///
/// # Errors
/// The kernel refuses.
pub fn enter_empty() -> Result<(), JailError> {
    // One block and the root's own inode: 0 would mean no limit.
    let empty = new_tmpfs(&[(c"size", c"4k"), (c"nr_inodes", c"1"), (c"mode", c"0555")])?;
    set_attributes(empty.as_fd(), READ_ONLY, false).during("make the empty root read-only")?;
    attach(empty.as_fd(), c"/").during("mount the empty root")?;
    pivot_into(empty.as_fd())
}

/// Moves the process into `root`, a directory that is a mount point of its mount namespace, which
/// [was detached](detach_from_host); every other mount goes.
///
/// # Errors
/// The kernel refuses; `EINVAL` where the host's own root is the initial RAM disk, which can't be
/// left this way.
pub fn pivot_into(root: BorrowedFd<'_>) -> Result<(), JailError> {
    fchdir(root).during("enter the new root")?;
    // With both names the same the old root ends up mounted over the new one: pivot_root(2).
    pivot_root(".", ".").during("make the new root the namespace's root")?;
    umount2(".", MntFlags::MNT_DETACH).during("unmount the old root")?;
    chdir("/").during("enter the new root")
}

/// A tmpfs that isn't mounted anywhere yet.
pub(super) fn new_tmpfs(settings: &[(&CStr, &CStr)]) -> Result<OwnedFd, JailError> {
    const STEP: &str = "create an empty file system";
    let context = fsopen(c"tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).during(STEP)?;
    for &(key, value) in settings {
        fsconfig_set_string(context.as_fd(), key, value).during(STEP)?;
    }
    fsconfig_create(context.as_fd()).during(STEP)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).during(STEP)
}

/// Mounts what isn't mounted anywhere yet at an absolute path.
pub(super) fn attach(mount: BorrowedFd<'_>, at: &CStr) -> io::Result<()> {
    attach_below(mount, rustix::fs::CWD, at)
}

/// Mounts what isn't mounted anywhere yet at a path below `directory`.
pub(super) fn attach_below(
    mount: BorrowedFd<'_>,
    directory: BorrowedFd<'_>,
    at: &CStr,
) -> io::Result<()> {
    move_mount(mount, c"", directory, at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    Ok(())
}

/// Sets attributes of a mount, and of all below it if `recursive`.
///
/// # Errors
/// As mount_setattr(2).
pub fn set_attributes(mount: BorrowedFd<'_>, attributes: u64, recursive: bool) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: a mount_attr is plain numbers, for which zero means nothing.
    let mut change: libc::mount_attr = unsafe { std::mem::zeroed() };
    change.attr_set = attributes;
    // SAFETY: the pointer and length describe `change`, which the kernel only reads.
    checked(unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const change,
            size_of::<libc::mount_attr>(),
        )
    })
    .map(|_| ())
}
