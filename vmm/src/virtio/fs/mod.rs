//! virtio-fs: the fs backend process, which serves a guest's share of the host's files over
//! vhost-user, to either engine.
//!
//! # What the guest gets
//! One file system with `rootfs/` and `mounts/<index>`, and what is added for further containers,
//! that behaves as a local one: owners, modes,
//! set-id bits, extended attributes and POSIX ACLs, hard links, sockets, FIFOs and device nodes,
//! sparse files, files without a name, nanosecond times. Locks are the guest's own affair: no other kernel sees them.
//! `trusted.*` attributes, `chattr` flags and leases are not available. All parts have one `st_dev`
//! in the guest; inode numbers differ between them, and links and renames from one to another fail
//! with `EXDEV`.
//!
//! # Who does what
//! * [`tree`]: the mount namespace that holds the share and nothing else.
//! * [`additions`]: what others put there while it is served.
//! * [`confinement`]: capabilities, limits and system calls.
//! * [`guarded`]: checks on what the guest names, and how long it may cache.
//! * [`request`]: one request to its reply.
//! * [`backend`]: queues and threads.
//! * [`throttle`]: limits of requests and bytes a second.
//!
//! The FUSE protocol and the passing of operations to the host's files are `virtiofsd`'s, used as a
//! library. It was chosen over `fuse-backend-rs`, which has neither POSIX ACLs nor default ACLs (it
//! applies the mode mask itself), no supplementary groups and no `copy_file_range`, sets an open
//! file's flags from each request's in a race with the other threads', and opens `/proc` by path.
//!
//! # Trust
//! The guest is hostile. Whatever it asks stays in the tree: names are checked, the tree is all that
//! the process can reach, and special files are never opened (the library refuses to open what is
//! neither a file nor a directory, and the tree is mounted `nodev`). What it can do to its own tree
//! a container could have done too.
//!
//! Each file that the guest knows is one that the process has open, and beyond the limit of open files
//! the guest sees `ENFILE` until it forgets some. File handles would cost no open file, but also let
//! whoever takes the process over open every file of the file systems that are shared from
//! ([`confinement`]).

mod additions;
mod backend;
mod confinement;
mod guarded;
pub(crate) mod request;
mod throttle;
mod tree;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::{Error as VhostUserError, Listener};
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::passthrough::{
    CachePolicy, Config as PassthroughConfig, InodeFileHandlesMode, NegotiationMode, PassthroughFs,
};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::config::{FileLimits, FsConfig, VmmEvent};
use crate::jail::descriptors;
use crate::jail::seccomp::threads::{Thread, narrow};
use backend::FsBackend;
use guarded::GuardedFs;
pub(crate) use guarded::Space;

pub use additions::{Served, enter_mount_namespace};
pub use backend::{QUEUE_SIZE, QUEUES};
pub use confinement::{ConfinementError, restrict_system_calls};
pub use guarded::{ADDITIONS, MAX_MOUNT_INDEX};
pub use tree::{Place, Share, ShareOptions, TreeError};

/// Why the fs backend could not serve.
#[derive(Debug, thiserror::Error)]
pub enum FsError {
    /// The tree.
    #[error("cannot build the shared tree")]
    Tree(#[from] TreeError),
    /// The confinement.
    #[error("cannot confine the fs backend")]
    Confinement(#[from] ConfinementError),
    /// The control socket.
    #[error("cannot tell the monitor")]
    Control(#[source] io::Error),
    /// The passthrough file system.
    #[error("cannot serve the shared tree")]
    Passthrough(#[source] io::Error),
    /// The device or its connection.
    #[error("vhost-user connection failed: {0}")]
    VhostUser(String),
}

/// Serves until the frontend disconnects; the process ends by itself when the control socket's other
/// end closes. Confines the calling process, which must have a single thread, for good.
///
/// # Errors
/// See [`FsError`]: before the first request is served, or when the frontend breaks the protocol.
///
/// # Safety
/// As for [`InheritedFd::take`](crate::config::InheritedFd::take), for every descriptor in `config`.
pub unsafe fn serve(config: FsConfig) -> Result<(), FsError> {
    let limits = config.limits;
    // SAFETY: the caller's promise.
    let Confined { control, socket, fd_directory, file_limit } = unsafe { confine(config) }?;
    let space = limited_space(limits, &control).map_err(FsError::Control)?;
    let file_system = file_system_at("/", fd_directory, file_limit, space);
    let file_system = file_system.map_err(FsError::Passthrough)?;
    let backend = Arc::new(FsBackend::new(file_system, limits));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("vhost-user".to_owned(), Arc::clone(&backend), memory)
        .map_err(|error| FsError::VhostUser(error.to_string()))?;
    end_with(control.try_clone().map_err(FsError::Control)?)?;
    confinement::restrict_system_calls(control.as_fd())?;
    tell(&control, &VmmEvent::Running).map_err(FsError::Control)?;

    let mut listener = Listener::from(socket);
    daemon.start(&mut listener).map_err(|error| FsError::VhostUser(error.to_string()))?;
    let ended = daemon.wait();
    backend.end();
    match ended {
        Ok(()) => Ok(()),
        // A frontend that ends closes its socket wherever it is.
        Err(vhost_user_backend::Error::HandleRequest(
            VhostUserError::Disconnected | VhostUserError::PartialMessage,
        )) => Ok(()),
        Err(error) => Err(FsError::VhostUser(error.to_string())),
    }
}

/// What a confined process serves with.
pub struct Confined {
    /// The monitor's socket.
    pub control: OwnedFd,
    socket: UnixListener,
    fd_directory: File,
    file_limit: u64,
}

/// Confines the calling process, which must have a single thread, for good to what `config` shares.
/// Only its system calls are yet to be [restricted](restrict_system_calls).
///
/// # Errors
/// See [`FsError`]. The process must end.
///
/// # Safety
/// As for [`serve`].
pub unsafe fn confine(config: FsConfig) -> Result<Confined, FsError> {
    keep_only_configured(&config)?;
    // SAFETY: the caller's promise; likewise below, where each is taken once.
    let control = unsafe { config.control.take() };
    // SAFETY: as above.
    let socket = UnixListener::from(unsafe { config.socket.take() });
    // SAFETY: as above.
    let shares = unsafe { take_shares(&config) }?;

    let file_limit = confinement::limit()?;
    confinement::leave_namespaces()?;
    let fd_directory = tree::enter(&shares)?;
    drop(shares);
    confinement::drop_privileges(control.as_fd())?;
    Ok(Confined { control, socket, fd_directory, file_limit })
}

/// Clones what is shared.
///
/// # Safety
/// As for [`serve`]; each share's source is taken.
unsafe fn take_shares(config: &FsConfig) -> Result<Vec<Share>, TreeError> {
    let mut shares = Vec::with_capacity(config.mounts.len() + 1);
    // SAFETY: the caller's promise.
    let source = unsafe { config.rootfs.source.take() };
    let options = ShareOptions { read_only: config.rootfs.read_only, recursive: true };
    shares.push(Share::new(source.as_fd(), Place::Rootfs, options)?);
    for mount in &config.mounts {
        if mount.index > MAX_MOUNT_INDEX {
            return Err(TreeError::LargeIndex(mount.index));
        }
        // SAFETY: the caller's promise.
        let source = unsafe { mount.source.take() };
        let place = Place::Mount { index: mount.index, is_file: mount.is_file };
        let options = ShareOptions { read_only: mount.read_only, recursive: mount.recursive };
        shares.push(if mount.is_mount {
            Share::of_mount(source, place, options)?
        } else {
            Share::new(source.as_fd(), place, options)?
        });
    }
    Ok(shares)
}

/// Of the files that may be open, the part for files without a name.
const NAMELESS_PART: u64 = 8;

/// What the guest may add. The monitor is told when that is used up.
fn limited_space(limits: FileLimits, control: &OwnedFd) -> io::Result<Option<Space>> {
    let Some(limit) = limits.space else { return Ok(None) };
    let control = control.try_clone()?;
    let on_full = move || {
        if let Err(error) = tell(&control, &VmmEvent::SpaceUsedUp) {
            tracing::warn!(%error, "the monitor can't be told that the guest's space is used up");
        }
    };
    Ok(Some(Space::new(limit.get(), Box::new(on_full))))
}

/// The file system over the directory `root`, with `/proc/self/fd`.
pub(crate) fn file_system_at(
    root: &str,
    fd_directory: File,
    file_limit: u64,
    space: Option<Space>,
) -> io::Result<GuardedFs> {
    let nameless_limit = file_limit / NAMELESS_PART;
    let library = PassthroughFs::new(PassthroughConfig {
        root_dir: root.to_owned(),
        proc_sfd_rawfd: Some(fd_directory.try_clone()?),
        ..passthrough_config(file_limit - nameless_limit)
    })?;
    let nameless_limit = usize::try_from(nameless_limit).unwrap_or(usize::MAX);
    Ok(GuardedFs::new(library, fd_directory, nameless_limit, space))
}

/// How the library serves.
fn passthrough_config(file_limit: u64) -> PassthroughConfig {
    PassthroughConfig {
        // The guest's cache drops what it holds of a file whose size or mtime has changed. How long
        // it may believe those is for `GuardedFs` to say.
        cache_policy: CachePolicy::Auto,
        // A write reaches the host's page cache before the guest's write returns: what a step has
        // written is there when it ends, however it ends.
        writeback: false,
        xattr: true,
        posix_acl: NegotiationMode::Auto,
        announce_submounts: false,
        inode_file_handles: InodeFileHandlesMode::Never,
        readdirplus: true,
        allow_direct_io: true,
        // The host clears set-id bits on write. Otherwise the guest asks for the file's capabilities
        // before each write.
        killpriv_v2: true,
        clean_noatime: false,
        guest_fd_limit: file_limit,
        ..PassthroughConfig::default()
    }
}

/// Ends the process once the other end of the control socket is closed.
fn end_with(control: OwnedFd) -> Result<(), FsError> {
    let wait = move || {
        narrow(Thread::Watch);
        let mut fds = [PollFd::new(&control, PollFlags::empty())];
        while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
        std::process::exit(0);
    };
    let thread = std::thread::Builder::new().name("control".to_owned()).spawn(wait);
    thread.map(drop).map_err(FsError::Control)
}

fn tell(control: &OwnedFd, event: &VmmEvent) -> io::Result<()> {
    rustix::io::write(control, &serde_json::to_vec(event)?)?;
    Ok(())
}

/// Closes every descriptor that neither the configuration nor the log needs.
fn keep_only_configured(config: &FsConfig) -> Result<(), FsError> {
    let mut kept = vec![libc::STDERR_FILENO, config.control.0, config.socket.0];
    kept.push(config.rootfs.source.0);
    kept.extend(config.mounts.iter().map(|mount| mount.source.0));
    descriptors::keep_only(&kept).map_err(|error| FsError::Confinement(error.into()))
}
