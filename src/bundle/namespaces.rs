//! What `linux.namespaces` asks of the host: the namespaces that the process which stands for the
//! container lives in.
//!
//! The container's own namespaces are the guest's. Callers look for some of them on the host all the
//! same, below `/proc/PID/ns`: to put network interfaces there, to run other containers of a pod in
//! them. So network, IPC, UTS and cgroup namespaces are joined or made on the host too. A path must
//! name a namespace of its field's type. These are refused, since no guest could honour them:
//!
//! * a path of a user, time or mount namespace;
//! * a path of the network namespace that kiln itself is in, whose interfaces the guest would take; but
//!   for a container of a pod, which takes none, and whose sandbox may have the host's network;
//! * a path of a PID namespace other than kiln's own, whose processes a guest cannot see. That of
//!   another container of kiln's is kiln's own.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use nix::sched::CloneFlags;
use nix::sys::statfs::{FsType, fstatfs};
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use serde::{Deserialize, Serialize};

use super::BundleError;
use super::pod::Part;

/// `NSFS_MAGIC` of linux/magic.h.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);

nix::ioctl_none_bad!(
    /// The type of a namespace as a `CLONE_NEW` flag, ioctl_ns(2).
    namespace_type,
    nix::request_code_none!(0xb7, 0x3)
);

/// A type of namespace that the host has too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamespaceKind {
    /// Interfaces, routes, and what goes with them.
    Network,
    /// System V IPC and POSIX message queues.
    Ipc,
    /// Host and domain name.
    Uts,
    /// What the process sees as the root of cgroups.
    Cgroup,
}

impl NamespaceKind {
    /// Its name in `linux.namespaces`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Network => "network",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Cgroup => "cgroup",
        }
    }

    /// The flag that makes one, clone(2).
    pub fn flag(self) -> CloneFlags {
        match self {
            Self::Network => CloneFlags::CLONE_NEWNET,
            Self::Ipc => CloneFlags::CLONE_NEWIPC,
            Self::Uts => CloneFlags::CLONE_NEWUTS,
            Self::Cgroup => CloneFlags::CLONE_NEWCGROUP,
        }
    }
}

/// A namespace of the host that a sandbox's monitor is to live in.
#[derive(Debug)]
pub struct Namespace {
    /// Its type.
    pub kind: NamespaceKind,
    /// One that exists, opened; without it the monitor gets a new one.
    pub existing: Option<OwnedFd>,
}

/// Finds the namespaces, and opens those that exist. `part` is the container's in a pod.
///
/// # Errors
/// One given twice, a path that names no namespace of its type, or one that can't be honoured.
pub fn find(spec: &Spec, part: Option<&Part>) -> Result<Vec<Namespace>, BundleError> {
    let takes_interfaces = !matches!(part, Some(Part::Container { .. }));
    let all =
        spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten();
    let mut seen = Vec::new();
    let mut found = Vec::new();
    for (index, namespace) in all.enumerate() {
        let field = format!("linux.namespaces[{index}]");
        let kind = namespace.typ();
        if seen.contains(&kind) {
            return Err(BundleError::field(field, format!("{kind} is given twice: remove one")));
        }
        seen.push(kind);
        let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty());
        let existing = match path {
            Some(path) => {
                let opened = open(kind, path, takes_interfaces);
                Some(opened.map_err(|reason| BundleError::field(field + ".path", reason))?)
            }
            None => None,
        };
        if let Some(kind) = on_host(kind) {
            found.push(Namespace { kind, existing });
        }
    }
    Ok(found)
}

fn on_host(kind: LinuxNamespaceType) -> Option<NamespaceKind> {
    match kind {
        LinuxNamespaceType::Network => Some(NamespaceKind::Network),
        LinuxNamespaceType::Ipc => Some(NamespaceKind::Ipc),
        LinuxNamespaceType::Uts => Some(NamespaceKind::Uts),
        LinuxNamespaceType::Cgroup => Some(NamespaceKind::Cgroup),
        LinuxNamespaceType::Mount
        | LinuxNamespaceType::User
        | LinuxNamespaceType::Pid
        | LinuxNamespaceType::Time => None,
    }
}

/// The flag of a type whose namespaces may be named by a path.
fn joinable(kind: LinuxNamespaceType) -> Option<CloneFlags> {
    match kind {
        LinuxNamespaceType::Pid => Some(CloneFlags::CLONE_NEWPID),
        _ => on_host(kind).map(NamespaceKind::flag),
    }
}

/// Opens a namespace; the error is the reason for which it is refused.
fn open(kind: LinuxNamespaceType, path: &Path, takes_interfaces: bool) -> Result<OwnedFd, String> {
    let shown = path.display();
    let Some(flag) = joinable(kind) else {
        return Err(format!(
            "the {kind} namespace {shown} of the host cannot be joined from inside a guest: remove \
             the path"
        ));
    };
    // A FIFO or a terminal in its place must not hold anything up.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    let opened = File::options().read(true).custom_flags(flags).open(path);
    let file = opened.map_err(|error| format!("{shown}: {error}"))?;
    let is_namespace = fstatfs(&file).is_ok_and(|found| found.filesystem_type() == NSFS_MAGIC);
    if !is_namespace {
        return Err(format!("{shown} is not a namespace: name one, as in /proc/PID/ns"));
    }
    // SAFETY: asks a namespace's open descriptor for a number.
    let found = unsafe { namespace_type(file.as_raw_fd()) };
    if found.ok().map(CloneFlags::from_bits_retain) != Some(flag) {
        return Err(format!("{shown} is a namespace of another type than {kind}"));
    }
    if kind == LinuxNamespaceType::Network && takes_interfaces && is_own(&file, "net") {
        return Err(format!(
            "{shown} is the network namespace that kiln itself is in, whose interfaces a guest would \
             take away: give the container one of its own"
        ));
    }
    if kind == LinuxNamespaceType::Pid && !is_own(&file, "pid") {
        return Err(format!(
            "a guest cannot see the processes of the PID namespace {shown}: remove the path"
        ));
    }
    Ok(file.into())
}

fn is_own(file: &File, name: &str) -> bool {
    let identity = |metadata: std::fs::Metadata| (metadata.dev(), metadata.ino());
    let own = std::fs::metadata(Path::new("/proc/self/ns").join(name)).map(identity);
    matches!((own, file.metadata().map(identity)), (Ok(own), Ok(found)) if own == found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn find_in(namespaces: Value) -> Result<Vec<Namespace>, BundleError> {
        let spec = json!({"ociVersion": "1.0.2", "linux": {"namespaces": namespaces}});
        find(&serde_json::from_value(spec).expect("spec"), None)
    }

    fn refusal(namespaces: Value) -> String {
        find_in(namespaces).expect_err("refused").to_string()
    }

    #[test]
    fn new_and_existing_namespaces_of_the_host_are_told_apart() {
        let found = find_in(json!([
            {"type": "pid", "path": "/proc/self/ns/pid"},
            {"type": "network"},
            {"type": "ipc", "path": "/proc/self/ns/ipc"},
            {"type": "uts", "path": ""},
            {"type": "mount"},
            {"type": "cgroup"},
            {"type": "user"},
        ]))
        .expect("fine");
        let found: Vec<_> = found.iter().map(|n| (n.kind, n.existing.is_some())).collect();
        assert_eq!(
            found,
            [
                (NamespaceKind::Network, false),
                (NamespaceKind::Ipc, true),
                (NamespaceKind::Uts, false),
                (NamespaceKind::Cgroup, false),
            ]
        );
    }

    #[test]
    fn what_is_no_namespace_of_the_type_is_refused_by_field() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let fifo = dir.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        for (path, word) in [
            ("/dev/null", "is not a namespace"),
            ("/proc/self/status", "is not a namespace"),
            (fifo.to_str().expect("text"), "is not a namespace"),
            ("/proc/self/ns", "is not a namespace"),
            ("/no/such", "No such file"),
            ("/proc/self/ns/ipc", "another type"),
        ] {
            let error = refusal(json!([{"type": "pid"}, {"type": "network", "path": path}]));
            assert!(error.starts_with("linux.namespaces[1].path: "), "{error}");
            assert!(error.contains(word) && error.contains(path), "{error}");
        }
    }

    #[test]
    fn namespaces_that_no_guest_can_be_in_are_refused() {
        for kind in ["mount", "user"] {
            let error = refusal(json!([{"type": kind, "path": "/proc/self/ns/mnt"}]));
            assert!(error.contains("cannot be joined"), "{error}");
        }
        let error = refusal(json!([{"type": "network", "path": "/proc/self/ns/net"}]));
        assert!(error.contains("kiln itself"), "{error}");
        let own = json!({"linux": {"namespaces": [{"type": "network", "path": "/proc/self/ns/net"}]},
            "ociVersion": "1.0.2"});
        let part = Part::Container { sandbox: "pod".to_owned(), annotation: "" };
        let own = serde_json::from_value(own).expect("spec");
        assert_eq!(find(&own, Some(&part)).expect("its sandbox's").len(), 1);
        assert!(find(&own, Some(&Part::Sandbox)).is_err());
        let error = refusal(json!([{"type": "ipc"}, {"type": "ipc"}]));
        assert!(error.starts_with("linux.namespaces[1]: ") && error.contains("twice"), "{error}");
    }
}
