//! A container's view of files: its root file system, what is mounted there, its devices.
//!
//! Everything is done in the container's own mount namespace by its first process, while the agent's
//! tree is still its root. The root file system and the bind mounts come as detached mounts that the
//! agent took from the share (which is closed to the container's users); all targets are
//! [found](kiln_rooted) below the root file system, whose links are not trusted; at the end the
//! process pivots into it and the agent's tree is gone.
//!
//! What is asked to be read-only and belongs to the guest becomes so last, so that mounts can be
//! made inside it, whatever their order.

pub mod copy_up;
pub mod devices;
mod hide;
mod options;
mod plan;
pub mod terminal;
pub mod tree;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_protocol::FailurePhase;
use kiln_rooted::{self as resolve, Kind};
use rustix::fs::{Mode, OFlags, ResolveFlags};

pub use plan::{MountPlan, MountSource, RootfsPlan};

use crate::failure::{During, Failure};
use terminal::Terminal;
use tree::Attributes;

/// What the agent has made ready for a container's first process.
#[derive(Debug)]
pub struct Supplies {
    /// The root file system, detached.
    pub rootfs: OwnedFd,
    /// Bind mounts, detached, by their index in `mounts`.
    pub binds: BTreeMap<usize, OwnedFd>,
    /// A directory of the agent's to mount the root file system at.
    pub mount_point: PathBuf,
    /// The nodes of the plan's devices, by index.
    pub devices: Vec<PathBuf>,
    /// A node of `/dev/null`.
    pub null: PathBuf,
    /// The container has a user namespace, in which device nodes cannot be made.
    pub bind_devices: bool,
}

/// Builds the container's tree and makes it the calling process's root; `complete` is called with it
/// in between. Gives its terminal, if it is to have one.
///
/// # Errors
/// The first thing that fails, by the field of the configuration that asks for it.
pub fn enter(
    plan: &RootfsPlan,
    supplies: &Supplies,
    complete: impl FnOnce(BorrowedFd<'_>) -> Result<(), Failure>,
) -> Result<Option<Terminal>, Failure> {
    isolate().during(FailurePhase::Mounts, || "make all mounts private")?;
    let root = supplies.rootfs.as_fd();
    attach_root(supplies).during(FailurePhase::Mounts, || "mount the root file system")?;
    let mut read_only = Vec::new();
    for mount in &plan.mounts {
        mount_one(root, mount, supplies, &mut read_only)
            .during(FailurePhase::Mounts, || mount.field())?;
    }
    if plan.fill_dev {
        for (device, node) in plan.devices.iter().zip(&supplies.devices) {
            devices::place(root, device, node, !supplies.bind_devices)?;
        }
        devices::link(root)?;
    }
    let terminal = plan
        .terminal
        .map(|size| terminal::allocate(root, size))
        .transpose()
        .during(FailurePhase::Stdio, || "process.terminal: /dev/pts")?;
    if let Some(terminal) = &terminal {
        terminal::make_console(root, terminal)
            .during(FailurePhase::Stdio, || "process.terminal: /dev/console")?;
    }
    resolve::ensure(root, &plan.cwd, Kind::Directory)
        .during(FailurePhase::Mounts, || format!("process.cwd ({})", plan.cwd.display()))?;
    complete(root)?;
    for path in &plan.read_only_paths {
        hide::make_read_only(root, path)?;
    }
    for path in &plan.masked_paths {
        hide::mask(root, path, &supplies.null)?;
    }
    for mount in read_only {
        tree::set_attributes(mount.as_fd(), Attributes::READ_ONLY, false)
            .during(FailurePhase::Mounts, || "make a mount read-only")?;
    }
    pivot(root).during(FailurePhase::Mounts, || "pivot_root")?;
    finish_root(plan).during(FailurePhase::Mounts, || "root")?;
    Ok(terminal)
}

fn isolate() -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root = rustix::fs::open(c"/", flags, Mode::empty())?;
    tree::set_attributes(root.as_fd(), Attributes::propagation(libc::MS_PRIVATE), true)
}

fn attach_root(supplies: &Supplies) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let target = rustix::fs::open(&supplies.mount_point, flags, Mode::empty())?;
    tree::attach(supplies.rootfs.as_fd(), target.as_fd())
}

fn mount_one(
    root: BorrowedFd<'_>,
    mount: &MountPlan,
    supplies: &Supplies,
    read_only: &mut Vec<OwnedFd>,
) -> io::Result<()> {
    let kind = match mount.source {
        MountSource::Share { is_file: true, .. } => Kind::File,
        _ => Kind::Directory,
    };
    if mount.must_be_plain() {
        refuse_links(root, &mount.destination)?;
    }
    let existed = resolve::lookup(root, &mount.destination).is_ok();
    let target = resolve::ensure(root, &mount.destination, kind)?;
    let (tree, mut attributes) = match &mount.source {
        MountSource::Share { .. } => {
            let tree = supplies.binds.get(&mount.index).ok_or(io::ErrorKind::NotFound)?;
            (tree.try_clone()?, mount.options.attributes)
        }
        MountSource::FileSystem { kind, source } => {
            let mut parameters = mount.options.parameters.clone();
            let stat = resolve::metadata(target.as_fd())?;
            if kind == "tmpfs" && existed && parameters.iter().all(|(key, _)| key != "mode") {
                let mode = format!("{:o}", stat.st_mode & 0o7777);
                parameters.push(("mode".to_owned(), Some(mode)));
            }
            let tree = tree::new_file_system(kind, source, &parameters)?;
            if mount.options.copy_up {
                copy_up::copy(target.as_fd(), tree.as_fd())?;
            }
            (tree, mount.options.attributes)
        }
    };
    if matches!(mount.source, MountSource::FileSystem { .. })
        && attributes.set & libc::MOUNT_ATTR_RDONLY != 0
    {
        attributes.set &= !libc::MOUNT_ATTR_RDONLY;
        read_only.push(tree.try_clone()?);
    }
    tree::set_attributes(tree.as_fd(), attributes, false)?;
    tree::set_attributes(tree.as_fd(), mount.options.recursive_attributes, true)?;
    tree::attach(tree.as_fd(), target.as_fd())?;
    for &(propagation, recursive) in &mount.options.propagation {
        tree::set_attributes(tree.as_fd(), Attributes::propagation(propagation), recursive)?;
    }
    Ok(())
}

/// proc and sysfs are what masked and read-only paths protect: they must be where they seem to be.
fn refuse_links(root: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = path.strip_prefix("/").unwrap_or(path);
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Err(rustix::io::Errno::LOOP) => {
            Err(io::Error::other("a symbolic link in the root file system leads elsewhere"))
        }
        _ => Ok(()),
    }
}

fn pivot(root: BorrowedFd<'_>) -> io::Result<()> {
    rustix::process::fchdir(root)?;
    rustix::process::pivot_root(c".", c".")?;
    rustix::mount::unmount(c".", rustix::mount::UnmountFlags::DETACH)?;
    Ok(rustix::process::chdir(c"/")?)
}

fn finish_root(plan: &RootfsPlan) -> io::Result<()> {
    let root = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    if plan.read_only {
        tree::set_attributes(root.as_fd(), Attributes::READ_ONLY, false)?;
    }
    let Some((propagation, recursive)) = plan.propagation else {
        return Ok(());
    };
    tree::set_attributes(root.as_fd(), Attributes::propagation(propagation), recursive)
}
