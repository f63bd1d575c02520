//! Device nodes of a container: the default ones of the runtime specification and `linux.devices`.
//!
//! The agent keeps a [`DeviceStore`]: a directory on a tmpfs of its own with a node for each device
//! that containers are to have. A container whose `/dev` takes device nodes gets nodes of its own; one
//! in a user namespace cannot make any, and gets bind mounts of the store's.
//!
//! A node alone gives nothing: [`crate::cgroup::devices`] decides which may be opened.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_protocol::FailurePhase;
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};
use rustix::fs::{AtFlags, FileType, Gid, Mode, Uid, makedev};

use super::tree;
use crate::failure::{During, Failure};
use kiln_rooted::{self as resolve, Kind};

/// A device node to make.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Where, inside the container.
    pub path: PathBuf,
    /// Its type and, for all but a FIFO, its number.
    pub node: Node,
    /// Permission bits.
    pub mode: u32,
    /// Owner and group, in the container's user namespace.
    pub owner: (u32, u32),
    /// The field of the configuration, for messages.
    pub field: String,
}

/// What a node stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Node {
    /// A character device's major and minor number.
    Character(u32, u32),
    /// A block device's major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

impl Node {
    fn file_type(self) -> FileType {
        match self {
            Self::Character(..) => FileType::CharacterDevice,
            Self::Block(..) => FileType::BlockDevice,
            Self::Fifo => FileType::Fifo,
        }
    }

    fn number(self) -> u64 {
        match self {
            Self::Character(major, minor) | Self::Block(major, minor) => makedev(major, minor),
            Self::Fifo => 0,
        }
    }
}

/// The devices that every container has (runtime specification, "Default Devices"), by name under
/// `/dev`, with their minor and major numbers.
const DEFAULT: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// The devices of a container: the default ones, replaced and followed by those of its
/// configuration. A container that may use every device (`all`) is meant to have its machine's, of which
/// callers list the host's: those that the guest lacks are left out.
///
/// # Errors
/// A type or number that can't be honoured, by name.
pub fn plan(devices: &[LinuxDevice], all: bool) -> Result<Vec<Device>, Failure> {
    let mut planned: Vec<Device> = DEFAULT
        .iter()
        .map(|&(name, major, minor)| Device {
            path: Path::new("/dev").join(name),
            node: Node::Character(major, minor),
            mode: 0o666,
            owner: (0, 0),
            field: format!("default device /dev/{name}"),
        })
        .collect();
    for (index, device) in devices.iter().enumerate() {
        let device = from_spec(device, format!("linux.devices[{index}]"))?;
        if all && !guest_has(device.node) {
            continue;
        }
        planned.retain(|default| default.path != device.path);
        planned.push(device);
    }
    Ok(planned)
}

fn from_spec(device: &LinuxDevice, field: String) -> Result<Device, Failure> {
    let path = device.path().clone();
    if !path.is_absolute() {
        return Err(Failure::config(format!("{field}.path: {path:?} is not absolute")));
    }
    let number = |value: i64, name: &str| {
        u32::try_from(value).during(FailurePhase::Config, || format!("{field}.{name}: {value}"))
    };
    let numbers = || Ok((number(device.major(), "major")?, number(device.minor(), "minor")?));
    let node = match device.typ() {
        LinuxDeviceType::P => Node::Fifo,
        LinuxDeviceType::B => numbers().map(|(major, minor)| Node::Block(major, minor))?,
        LinuxDeviceType::C | LinuxDeviceType::U => {
            numbers().map(|(major, minor)| Node::Character(major, minor))?
        }
        LinuxDeviceType::A => {
            return Err(Failure::config(format!("{field}.type: \"a\" is no type of a node")));
        }
    };
    let mode = device.file_mode().unwrap_or(0o666) & 0o7777;
    let owner = (device.uid().unwrap_or(0), device.gid().unwrap_or(0));
    Ok(Device { path, node, mode, owner, field })
}

/// Whether the guest's kernel has a driver for a device; sysfs lists them by number.
fn guest_has(node: Node) -> bool {
    let path = match node {
        Node::Fifo => return true,
        Node::Character(major, minor) => format!("/sys/dev/char/{major}:{minor}"),
        Node::Block(major, minor) => format!("/sys/dev/block/{major}:{minor}"),
    };
    Path::new(&path).exists()
}

/// The agent's own device nodes: one directory a container, nodes named by their index.
#[derive(Debug)]
pub struct DeviceStore {
    directory: PathBuf,
}

impl DeviceStore {
    /// Makes the nodes of a container in `directory`, which is new and whose file system takes
    /// device nodes. Owners are ids of the agent's user namespace (`map`).
    ///
    /// # Errors
    /// A device that the guest doesn't have, by field; what mknod(2) says.
    pub fn create(
        directory: PathBuf,
        devices: &[Device],
        map: impl Fn((u32, u32)) -> (u32, u32),
    ) -> Result<Self, Failure> {
        std::fs::create_dir_all(&directory)
            .during(FailurePhase::Mounts, || format!("create {directory:?}"))?;
        let store = Self { directory };
        for (index, device) in devices.iter().enumerate() {
            if !guest_has(device.node) {
                let Device { field, path, node, .. } = device;
                return Err(Failure::config(format!(
                    "{field}: {path:?} ({node:?}): the guest has no such device"
                )));
            }
            let node = store.node(index);
            make_node(rustix::fs::CWD, &node, device, map(device.owner))
                .during(FailurePhase::Mounts, || device.field.clone())?;
        }
        Ok(store)
    }

    /// Path of a container's device, by its index.
    pub fn node(&self, index: usize) -> PathBuf {
        self.directory.join(index.to_string())
    }
}

impl Drop for DeviceStore {
    fn drop(&mut self) {
        // The tmpfs ends with the guest; a failure here costs a few inodes until then.
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn make_node(
    parent: BorrowedFd<'_>,
    name: &Path,
    device: &Device,
    (uid, gid): (u32, u32),
) -> io::Result<()> {
    let mode = Mode::from_raw_mode(device.mode);
    rustix::fs::mknodat(parent, name, device.node.file_type(), mode, device.node.number())?;
    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
    rustix::fs::chownat(parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(rustix::fs::chmodat(parent, name, mode, AtFlags::empty())?)
}

/// Puts a device at its place below `root`: a node of its own where `own_nodes` says that this works,
/// else a bind mount of the store's node.
///
/// # Errors
/// What stands in the way, by the device's field.
pub fn place(
    root: BorrowedFd<'_>,
    device: &Device,
    stored: &Path,
    own_nodes: bool,
) -> Result<(), Failure> {
    let field = || format!("{} ({})", device.field, device.path.display());
    if own_nodes {
        let (parent, name) =
            resolve::ensure_parent(root, &device.path).during(FailurePhase::Mounts, field)?;
        match make_node(parent.as_fd(), Path::new(name), device, device.owner) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if is_already(root, device) {
                    return Ok(());
                }
            }
            Err(error) => return Err(error).during(FailurePhase::Mounts, field),
        }
    }
    bind(root, &device.path, stored).during(FailurePhase::Mounts, field)
}

/// Mounts the file `source` over `path`, which is created if it is missing.
///
/// # Errors
/// As open_tree(2), move_mount(2) and openat(2).
pub fn bind(root: BorrowedFd<'_>, path: &Path, source: &Path) -> io::Result<()> {
    let tree = tree::copy_of_path(source, false)?;
    let target = resolve::ensure(root, path, Kind::File)?;
    tree::attach(tree.as_fd(), target.as_fd())
}

/// Opens a device below `root` after checking that it is the one that is meant.
///
/// # Errors
/// `ENODEV` if another file is there; as openat2(2).
pub fn open_checked(
    root: BorrowedFd<'_>,
    path: &Path,
    node: Node,
    flags: rustix::fs::OFlags,
) -> io::Result<OwnedFd> {
    let found = resolve::lookup(root, path)?;
    let stat = resolve::metadata(found.as_fd())?;
    if FileType::from_raw_mode(stat.st_mode) != node.file_type() || stat.st_rdev != node.number() {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    resolve::open(root, path, flags)
}

fn is_already(root: BorrowedFd<'_>, device: &Device) -> bool {
    let found = resolve::lookup(root, &device.path);
    let stat = found.and_then(|found| resolve::metadata(found.as_fd()));
    stat.is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode) == device.node.file_type()
            && stat.st_rdev == device.node.number()
    })
}

/// Symbolic links under `/dev` (runtime specification, "Dev symbolic links"), and `ptmx`.
const LINKS: [(&str, &str); 6] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
    ("/dev/ptmx", "pts/ptmx"),
];

/// Makes the symbolic links under `/dev`. What is there already stays, but `ptmx` always becomes the
/// link.
///
/// # Errors
/// As symlinkat(2).
pub fn link(root: BorrowedFd<'_>) -> Result<(), Failure> {
    for (path, target) in LINKS {
        let made = resolve::ensure_parent(root, Path::new(path)).and_then(|(parent, name)| {
            if path == "/dev/ptmx" {
                let _ = rustix::fs::unlinkat(&parent, name, AtFlags::empty());
            }
            match rustix::fs::symlinkat(target, &parent, name) {
                Err(rustix::io::Errno::EXIST) => Ok(()),
                made => Ok(made?),
            }
        });
        made.during(FailurePhase::Mounts, || format!("link {path}"))?;
    }
    Ok(())
}
