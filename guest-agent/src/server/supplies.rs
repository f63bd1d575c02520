//! What the agent makes ready for a container: its tree out of the share, device nodes, pipes.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use kiln_protocol::{FailurePhase, Stdio, StreamToken};
use rustix::fs::{AtFlags, Gid, Mode, OFlags, ResolveFlags, StatxFlags, Uid, statx};
use rustix::pipe::{PipeFlags, pipe_with};

use super::streams::Endpoint;
use crate::container::launch::StandardStreams;
use crate::container::{Plan, UserMappings};
use crate::failure::{During, Failure};
use crate::process::user::Identity;
use crate::rootfs::devices::{Device, DeviceStore, Node};
use crate::rootfs::{MountSource, Supplies, tree};
use crate::stream::make_non_blocking;

/// Where the agent finds things.
#[derive(Debug, Clone)]
pub struct Environment {
    /// The share.
    pub share: PathBuf,
    /// A directory that containers' root file systems are mounted at, each in its own namespace.
    pub mount_point: PathBuf,
    /// A directory, open to all users, on a file system that takes device nodes.
    pub devices: PathBuf,
    /// Processors.
    pub cpus: usize,
    /// Takes the host's time (nanoseconds since 1970).
    pub set_clock: fn(i64),
    /// Takes the host's randomness.
    pub credit_entropy: fn([u8; 32]),
}

/// Takes a container's tree from the share and makes its device nodes under the name `unique`.
///
/// # Errors
/// What isn't there or can't be made, by field.
pub fn gather(
    environment: &Environment,
    plan: &Plan,
    unique: u64,
) -> Result<(Supplies, DeviceStore), Failure> {
    let share = open_share(&environment.share, Path::new("."), "the share")?;
    let rootfs = take(&share, &plan.rootfs.source, true, "root.path")?;
    let mut binds = BTreeMap::new();
    for mount in &plan.rootfs.mounts {
        if let MountSource::Share { path, .. } = &mount.source {
            let tree = take(&share, path, mount.options.recursive_bind, &mount.field())?;
            binds.insert(mount.index, tree);
        }
    }
    let null = Device {
        path: "/dev/null".into(),
        node: Node::Character(1, 3),
        mode: 0o666,
        owner: (0, 0),
        field: "linux.maskedPaths".to_owned(),
    };
    let mut devices = if plan.rootfs.fill_dev { plan.rootfs.devices.clone() } else { Vec::new() };
    devices.push(null);
    let directory = environment.devices.join(unique.to_string());
    let user = plan.namespaces.user.as_ref();
    let map = |owner| user.map_or(owner, |user| user.outside(owner));
    let store = DeviceStore::create(directory, &devices, map)?;
    let nodes = (0..devices.len()).map(|index| store.node(index)).collect();
    let supplies = Supplies {
        rootfs,
        binds,
        mount_point: environment.mount_point.clone(),
        null: store.node(devices.len() - 1),
        devices: nodes,
        bind_devices: user.is_some(),
    };
    Ok((supplies, store))
}

/// Has the kernel ask the host what the sources of a container's bind mounts are now. Callers write to
/// them after the container's set-up (podman to its `resolv.conf`), and the kernel would believe for a
/// second what it saw then: an empty file, in the worst case.
pub fn refresh(environment: &Environment, plan: &Plan) {
    for mount in &plan.rootfs.mounts {
        if let MountSource::Share { path, .. } = &mount.source {
            let flags = AtFlags::STATX_FORCE_SYNC | AtFlags::SYMLINK_NOFOLLOW;
            // What can't be asked for any more, the container's program will see by itself.
            let path = environment.share.join(path);
            let _ = statx(rustix::fs::CWD, path, flags, StatxFlags::BASIC_STATS);
        }
    }
}

fn open_share(share: &Path, path: &Path, field: &str) -> Result<OwnedFd, Failure> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::open(share.join(path), flags, Mode::empty())
        .during(FailurePhase::Mounts, || format!("{field}: open in the share"))
}

fn take(share: &OwnedFd, path: &Path, recursive: bool, field: &str) -> Result<OwnedFd, Failure> {
    let what = || format!("{field}: {} in the share", path.display());
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let found = rustix::fs::openat2(share, path, flags, Mode::empty(), resolve)
        .during(FailurePhase::Mounts, what)?;
    tree::copy(found.as_fd(), recursive).during(FailurePhase::Mounts, what)
}

/// The size of stdio pipes in bytes, where the kernel grants it.
const PIPE_SIZE: usize = 1 << 20;

/// Makes the pipes of a process: its ends, and the agent's with their streams. They belong to the
/// process's user, in the user namespace if there is one, so that it can open `/dev/stdout` anew.
///
/// # Errors
/// As pipe2(2).
pub fn pipes(
    stdio: &Stdio,
    identity: &Identity,
    user: Option<&UserMappings>,
) -> Result<(StandardStreams, Vec<(StreamToken, Endpoint)>), Failure> {
    let owner = (identity.uid, identity.gid);
    let (uid, gid) = user.map_or(owner, |user| user.outside(owner));
    let mut streams = StandardStreams::default();
    let mut endpoints = Vec::new();
    let Stdio::Pipes { stdin, stdout, stderr } = stdio else {
        return Ok((streams, endpoints));
    };
    for (index, token) in [stdin, stdout, stderr].into_iter().enumerate() {
        let Some(token) = *token else {
            continue;
        };
        let (reader, writer) =
            pipe_with(PipeFlags::CLOEXEC).during(FailurePhase::Stdio, || "make a pipe")?;
        rustix::fs::fchown(&reader, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
            .during(FailurePhase::Stdio, || "give a pipe to process.user")?;
        // A smaller pipe is slower, no more.
        let _ = rustix::pipe::fcntl_setpipe_size(&reader, PIPE_SIZE);
        let (of_process, endpoint) = match index {
            0 => (reader, Endpoint::Input(writer)),
            _ => (writer, Endpoint::Output(reader)),
        };
        let (Endpoint::Input(end) | Endpoint::Output(end) | Endpoint::Terminal(end)) = &endpoint;
        make_non_blocking(end).during(FailurePhase::Stdio, || "make a pipe")?;
        streams.ends[index] = Some(of_process);
        endpoints.push((token, endpoint));
    }
    Ok((streams, endpoints))
}

/// The streams that a process's stdio names.
pub fn tokens(stdio: &Stdio) -> Vec<StreamToken> {
    match stdio {
        Stdio::Terminal { stream, .. } => vec![*stream],
        Stdio::Pipes { stdin, stdout, stderr } => {
            [stdin, stdout, stderr].into_iter().flatten().copied().collect()
        }
    }
}
