//! The container's place on the host, where the monitor stands, and the way out of it.
//!
//! Once it stands there, the host's paths mean nothing any more, and its own cgroup is the top of what it
//! sees of cgroups.

use std::thread;

use anyhow::{Context, anyhow};

use super::Monitor;
use crate::cgroup::Setting;
use crate::place::rootfs::{self, Host};

impl Monitor {
    /// Goes to where tools on the host look for the container's files. By now nothing is opened by
    /// path any more until the end.
    pub(super) fn enter_rootfs(&mut self) {
        match rootfs::enter(&self.container) {
            Ok(host) => self.host = host,
            Err(error) => tracing::warn!("tools on the host can't enter the container: {error:#}"),
        }
    }

    pub(super) fn leave_rootfs(&mut self) {
        if let Some(host) = self.host.take()
            && let Err(error) = host.go_back()
        {
            tracing::warn!(%error, "the host's files can't be reached any more");
        }
    }

    /// Does something by paths of the host, as the caller would have done it before the monitor had gone
    /// to the container's place: on a thread of its own, which is waited for.
    ///
    /// # Errors
    /// The way there is closed; what is to be done is not begun.
    pub(super) fn on_host<T: Send>(&self, errand: impl FnOnce() -> T + Send) -> anyhow::Result<T> {
        let (host, origin) = (self.host.as_ref(), &self.origin);
        let span = tracing::Span::current();
        let go = move || {
            let _entered = span.enter();
            host.map_or(Ok(()), Host::lend).context("the host's mount namespace")?;
            origin.lend_view();
            Ok(errand())
        };
        thread::scope(|scope| {
            let thread = thread::Builder::new().spawn_scoped(scope, go).context("thread")?;
            thread.join().map_err(|_| anyhow!("a thread has panicked"))?
        })
    }

    /// Sets limits of the container's cgroup.
    ///
    /// # Errors
    /// As [`Cgroup::apply`](crate::cgroup::Cgroup::apply).
    pub(super) fn limit(&self, limits: &[Setting]) -> anyhow::Result<()> {
        let cgroup = &self.record.cgroup;
        if limits.is_empty() { Ok(()) } else { self.on_host(|| cgroup.apply(limits))? }
    }
}
