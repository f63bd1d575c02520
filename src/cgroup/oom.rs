//! A kill for want of memory that happened in the guest, in the counts of the host's cgroup.
//!
//! Callers learn of it there: by `oom_kill` in `memory.events` (version 2), which containerd's shim and
//! conmon watch, and in `memory.oom_control` (version 1). Nobody can write there. But the kernel counts a
//! kill in the cgroup of the process that owns the killed memory, and chooses whom to kill in the cgroup
//! that has run full: mm/oom_kill.c, `__oom_kill_process` and `memcg_memory_event_mm`. The two need not be
//! one. So a cgroup is made for a moment beside the sandbox's, with a limit of nothing, and the kernel
//! kills a process in it that shares its memory with one in the sandbox's ([`victim`](super::victim)). The
//! sandbox's own processes and limits are not touched.
//!
//! `oom` stays as it is, for the sandbox's cgroup was not full; the counts of the cgroups above it, which
//! have those of both, grow too.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};

use super::directory::Directory;
use super::hierarchies::Kind;
use super::victim::VictimConfig;
use super::{Cgroup, PATIENCE, STEP};
use crate::process::{Launch, describe};
use crate::readiness::readable_by;

/// How long the kernel may take; it needs milliseconds.
const KILL: Duration = Duration::from_secs(5);

impl Cgroup {
    /// Has the host's kernel count a kill for want of memory. The calling process is in the cgroup, and
    /// sees the host's paths. Whether or not it succeeds, nothing stays behind.
    ///
    /// # Errors
    /// No cgroup can be made there, or the kernel does not kill. A host whose cgroups count no such kills is
    /// none.
    pub fn count_oom_kill(&self) -> anyhow::Result<()> {
        let Some(directory) = self.directories.iter().find(|d| d.oom_kills().is_some()) else {
            return Ok(());
        };
        // Such a host would not kill a process, but itself.
        let panics = fs::read_to_string("/proc/sys/vm/panic_on_oom").context("vm.panic_on_oom")?;
        ensure!(panics.trim() != "2", "vm.panic_on_oom is 2");
        let full = Full::beside(directory)?;
        full.kill_one()
    }
}

/// A cgroup in which there is no memory to be had. It goes when it is dropped.
struct Full(PathBuf);

impl Full {
    fn beside(directory: &Directory) -> anyhow::Result<Self> {
        let path = directory.beside();
        let named = || path.display().to_string();
        fs::create_dir(&path).with_context(named)?;
        let full = Self(path.clone());
        let limit = match directory.kind {
            Kind::V1(_) => "memory.limit_in_bytes",
            Kind::V2 => "memory.max",
        };
        write_existing(&path.join(limit), "0").with_context(named)?;
        Ok(full)
    }

    fn kill_one(&self) -> anyhow::Result<()> {
        let processes = self.0.join("cgroup.procs");
        let processes = File::options().write(true).open(&processes).context("cgroup.procs")?;
        let mut launch = Launch::verb("oom-victim", &[]);
        let config = VictimConfig { processes: launch.give(processes) };
        launch.configure(&config).context("configuration")?;
        let mut process = launch.spawn().context("start of a process")?;
        if !readable_by(process.pidfd(), Some(Instant::now() + KILL))? {
            process.kill_group();
            bail!("the kernel has killed nothing within {} s", KILL.as_secs());
        }
        let status = process.wait()?;
        ensure!(status.success(), "the process that was to be killed {}", describe(status));
        Ok(())
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = fs::remove_dir(&self.0) {
            let ends = error.raw_os_error() == Some(libc::EBUSY) && Instant::now() < deadline;
            if !ends {
                tracing::warn!(path = %self.0.display(), %error, "a cgroup stays behind");
                return;
            }
            std::thread::sleep(STEP);
        }
    }
}

fn write_existing(path: &Path, text: &str) -> io::Result<()> {
    io::Write::write_all(&mut File::options().write(true).open(path)?, text.as_bytes())
}
