//! From the kernel's `/init` to a guest that containers can be set up in.
//!
//! The kernel unpacks the agent into its initial root, which can't be pivoted away from. So the agent
//! first moves to a tmpfs of its own, mounts everything there, and makes that its root.

use std::fs;
use std::io;
use std::path::Path;

use rustix::mount::{MountFlags, mount, mount_move};
use rustix::process::{Resource, Rlimit};

use super::share;
use crate::{console, network};

/// Where the share is mounted. Closed to everyone but root of the guest.
pub const SHARE: &str = "/run/kiln/share";

/// Where containers' root file systems are mounted in their namespaces.
pub const ROOTFS: &str = "/run/kiln/rootfs";

/// Where containers' device nodes are kept.
pub const DEVICES: &str = "/run/kiln/devices";

/// The cgroup hierarchy.
pub const CGROUP: &str = "/sys/fs/cgroup";

/// A file system of the guest: type, target below the root, flags, data.
type FileSystem = (&'static str, &'static str, MountFlags, Option<&'static std::ffi::CStr>);

const SAFE: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);

const FILE_SYSTEMS: [FileSystem; 8] = [
    ("proc", "proc", SAFE, None),
    ("sysfs", "sys", SAFE, None),
    ("devtmpfs", "dev", MountFlags::NOSUID, None),
    (
        "devpts",
        "dev/pts",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        Some(c"mode=620,ptmxmode=666"),
    ),
    ("tmpfs", "dev/shm", SAFE, Some(c"mode=1777")),
    ("tmpfs", "run", MountFlags::NOSUID.union(MountFlags::NODEV), Some(c"mode=755")),
    (
        "tmpfs",
        "run/kiln/devices",
        MountFlags::NOSUID.union(MountFlags::NOEXEC),
        Some(c"mode=755,size=1m"),
    ),
    ("cgroup2", "sys/fs/cgroup", SAFE, Some(c"nsdelegate")),
];

/// Mounts the guest's file systems and the share, and brings the loopback interface up.
///
/// # Errors
/// The first that fails, with its name.
pub fn run() -> anyhow::Result<()> {
    let context = |what: &'static str| move |error: io::Error| anyhow::anyhow!("{what}: {error}");
    move_to_own_root().map_err(context("switch to a root of its own"))?;
    for (kind, target, flags, data) in FILE_SYSTEMS {
        mount_one(kind, target, flags, data)
            .map_err(|error| anyhow::anyhow!("mount {kind} on /{target}: {error}"))?;
    }
    console::say(format_args!("file systems mounted"));
    fs::create_dir_all(ROOTFS).map_err(context("create the rootfs mount point"))?;
    share::mount(Path::new(SHARE)).map_err(context("mount the share"))?;
    console::say(format_args!("share mounted"));
    network::bring_loopback_up().map_err(context("bring lo up"))?;
    protect().map_err(context("protect the agent"))?;
    Ok(())
}

fn move_to_own_root() -> io::Result<()> {
    const NEW: &str = "/root.new";
    fs::create_dir_all(NEW)?;
    mount("tmpfs", NEW, "tmpfs", MountFlags::NODEV, Some(c"mode=755"))?;
    std::env::set_current_dir(NEW)?;
    // What the kernel unpacked is not needed any more and would stay in memory.
    let _ = fs::remove_file("/init");
    mount_move(".", "/")?;
    rustix::process::chroot(c".")?;
    std::env::set_current_dir("/")
}

fn mount_one(
    kind: &str,
    target: &str,
    flags: MountFlags,
    data: Option<&std::ffi::CStr>,
) -> io::Result<()> {
    let target = Path::new("/").join(target);
    fs::create_dir_all(&target)?;
    Ok(mount(kind, &target, kind, flags, data)?)
}

/// Descriptors that the agent may open: each process that it cares for takes up to seven.
const DESCRIPTORS: u64 = 1 << 20;

/// The kernel never chooses the agent when memory runs out, and descriptors don't.
fn protect() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", "-1000")?;
    let limit = Rlimit { current: Some(DESCRIPTORS), maximum: Some(DESCRIPTORS) };
    Ok(rustix::process::setrlimit(Resource::Nofile, limit)?)
}
