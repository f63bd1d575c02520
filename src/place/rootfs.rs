//! The container's root file system as the root of the monitor's mount namespace.
//!
//! Callers that look into a running container from the host go by the process that stands for it:
//! they enter its mount namespace or look below `/proc/PID/root`. So the monitor goes there once it
//! has opened and started everything: the bundle's root file system with the bundle's bind mounts in
//! their places, and nothing else of the host. What the guest mounts by itself isn't there.
//!
//! Paths of the host mean nothing in there, and may mean what the container's author likes. What is to
//! be done by path is done after [`Host::go_back`], or by a thread that [`Host::lend`] has let out.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::Context;
use kiln_vmm::jail::root;
use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use crate::bundle::Bind;
use crate::sandbox::ContainerConfig;

/// The mount namespace that the monitor was started in.
#[derive(Debug)]
pub struct Host(OwnedFd);

/// Moves the calling thread, the process's first, into a mount namespace whose root is the
/// container's. `None`: it has no right to, and stays where it is.
///
/// # Errors
/// The kernel refuses a step; the thread is back where it was, if that is possible.
pub fn enter(container: &ContainerConfig) -> anyhow::Result<Option<Host>> {
    let host = File::open("/proc/self/ns/mnt").context("/proc/self/ns/mnt")?;
    let host = Host(host.into());
    match unshare(CloneFlags::CLONE_NEWNS) {
        Ok(()) => {}
        Err(nix::Error::EPERM) => {
            tracing::warn!("no right to make a mount namespace: tools on the host can't enter it");
            return Ok(None);
        }
        Err(error) => return Err(error).context("mount namespace"),
    }
    match assemble(container) {
        Ok(()) => Ok(Some(host)),
        Err(error) => {
            host.go_back().context("the host's mount namespace")?;
            Err(error)
        }
    }
}

/// Makes the container's root file system, with its bind mounts, the root of a new namespace.
fn assemble(container: &ContainerConfig) -> anyhow::Result<()> {
    root::detach_from_host()?;
    let sources: Vec<_> = container.binds.iter().map(source_of).collect();
    let rootfs = &container.rootfs;
    let named = || rootfs.display().to_string();
    let top = clone(rootfs, true).with_context(named)?;
    if container.rootfs_read_only {
        root::set_attributes(top.as_fd(), libc::MOUNT_ATTR_RDONLY, false).with_context(named)?;
    }
    let onto = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&top, c"", CWD, rootfs, onto).with_context(named)?;
    for (bind, source) in container.binds.iter().zip(sources) {
        // Where its place is in a mount of the guest's own, there is none on the host.
        if let Err(error) = source.and_then(|source| put(top.as_fd(), source, &bind.destination)) {
            let destination = bind.destination.display();
            tracing::debug!(%destination, %error, "a mount is in the guest only");
        }
    }
    Ok(root::pivot_into(top.as_fd())?)
}

fn source_of(bind: &Bind) -> io::Result<OwnedFd> {
    if !bind.overlay.is_empty() {
        // It can be mounted once: the guest has it.
        return Err(io::ErrorKind::ResourceBusy.into());
    }
    let source = clone(&bind.source, bind.recursive)?;
    if bind.read_only {
        root::set_attributes(source.as_fd(), libc::MOUNT_ATTR_RDONLY, bind.recursive)?;
    }
    Ok(source)
}

/// A copy of the mount at a path, not mounted anywhere yet.
fn clone(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(CWD, path, flags)?)
}

fn put(top: BorrowedFd<'_>, source: OwnedFd, destination: &Path) -> io::Result<()> {
    let place = kiln_rooted::lookup(top, destination)?;
    let by_descriptor =
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(source, c"", place, c"", by_descriptor)?)
}

impl Host {
    /// Moves the calling thread, which is to do something by paths of the host, there for good.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn lend(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_FS)?;
        Ok(setns(&self.0, CloneFlags::CLONE_NEWNS)?)
    }

    /// Moves the calling thread, the process's first, back.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn go_back(self) -> io::Result<()> {
        // Threads that were started meanwhile share root and working directory, which no thread may
        // leave with the others.
        unshare(CloneFlags::CLONE_FS)?;
        Ok(setns(self.0, CloneFlags::CLONE_NEWNS)?)
    }
}
