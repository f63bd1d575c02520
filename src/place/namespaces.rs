//! The namespaces that a sandbox's processes live in on the host.

use anyhow::{Context, anyhow};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{gethostname, sethostname};

use crate::bundle::{Namespace, NamespaceKind};
use crate::sandbox::NamespaceConfig;
use crate::state::Monitor;

/// Moves the calling process, which has one thread, into the namespaces. A new UTS namespace gets
/// `hostname`. New ones that the caller has no right to make are left out, with a warning.
///
/// # Errors
/// One that exists can't be joined, or the kernel has no room for a new one.
pub fn enter(namespaces: Vec<Namespace>, hostname: Option<&str>) -> anyhow::Result<()> {
    let mut new = CloneFlags::empty();
    for Namespace { kind, existing } in namespaces {
        match existing {
            Some(existing) => setns(existing, kind.flag())
                .with_context(|| format!("linux.namespaces: join the {} namespace", kind.name()))?,
            None => new |= kind.flag(),
        }
    }
    match unshare(new) {
        Ok(()) => {}
        Err(Errno::EPERM) => {
            tracing::warn!("no right to make namespaces on the host: only the guest has its own");
            return Ok(());
        }
        Err(error) => return Err(error).context("linux.namespaces: make new ones on the host"),
    }
    if let Some(hostname) = hostname
        && new.contains(NamespaceKind::Uts.flag())
    {
        sethostname(hostname).with_context(|| format!("hostname: {hostname:?}"))?;
    }
    Ok(())
}

/// The host name in the UTS namespace that the calling process has joined, if it has joined one.
///
/// # Errors
/// It is no text.
pub fn hostname_joined(namespaces: &[NamespaceConfig]) -> anyhow::Result<Option<String>> {
    let is_joined =
        |config: &NamespaceConfig| config.kind == NamespaceKind::Uts && config.existing.is_some();
    if !namespaces.iter().any(is_joined) {
        return Ok(None);
    }
    let name = gethostname().context("host name")?;
    let name = name.into_string().map_err(|name| anyhow!("host name {name:?}: it is no text"))?;
    Ok(Some(name))
}

/// Moves the calling process, which has one thread, into the network, IPC, UTS and cgroup namespaces
/// of a sandbox's monitor.
///
/// # Errors
/// The monitor has ended, or the caller has no right to.
pub fn join(monitor: Monitor) -> anyhow::Result<()> {
    let pidfd = monitor.open().context("the sandbox's monitor has ended")?;
    let kinds =
        [NamespaceKind::Network, NamespaceKind::Ipc, NamespaceKind::Uts, NamespaceKind::Cgroup];
    let flags = kinds.into_iter().fold(CloneFlags::empty(), |all, kind| all | kind.flag());
    setns(pidfd, flags).with_context(|| format!("namespaces of process {}", monitor.pid))
}
