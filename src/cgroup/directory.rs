//! One directory of one cgroup hierarchy.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::bail;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::hierarchies::{Hierarchy, Kind, way};
use super::limits::CpuTime;

/// Controllers that limits need, version 2.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// A sandbox's directory in a hierarchy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directory {
    /// The hierarchy's controllers.
    pub kind: Kind,
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The directory.
    pub path: PathBuf,
    /// The directories that did not exist, from the topmost to `path` itself.
    made: Vec<PathBuf>,
}

/// A relative path below the caller's own cgroup. In version 2 that can't have children with
/// controllers, since it holds processes: what is above it can.
pub fn below_own(hierarchy: &Hierarchy, path: &Path) -> PathBuf {
    let base = match &hierarchy.kind {
        Kind::V1(_) => &hierarchy.own,
        Kind::V2 => hierarchy.own.parent().unwrap_or(&hierarchy.mount),
    };
    let base = if base.starts_with(&hierarchy.mount) { base } else { &hierarchy.mount };
    base.join(path)
}

impl Directory {
    /// The directory for `path` in a hierarchy: below its mount if it is absolute, else below the
    /// caller's own.
    pub fn plan(hierarchy: &Hierarchy, path: &Path) -> Self {
        let full = match path.strip_prefix("/") {
            Ok(below_mount) => hierarchy.mount.join(below_mount),
            Err(_) => below_own(hierarchy, path),
        };
        let made = way(&hierarchy.mount, &full).into_iter().filter(|path| !path.exists()).collect();
        Self { kind: hierarchy.kind.clone(), mount: hierarchy.mount.clone(), path: full, made }
    }

    /// The name of a directory beside it that is there for a moment at most, and that nobody else has.
    pub fn beside(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".kiln-oom");
        self.path.with_file_name(name)
    }

    /// Whether the directory itself was made for the sandbox.
    pub fn is_made(&self) -> bool {
        self.made.contains(&self.path)
    }

    /// Refuses a directory that others use.
    ///
    /// # Errors
    /// It holds processes.
    pub fn check_empty(&self) -> anyhow::Result<()> {
        match pids(&self.path).len() {
            0 => Ok(()),
            count => bail!(
                "linux.cgroupsPath: container's cgroup is not empty: {} holds {count} process(es)",
                self.path.display()
            ),
        }
    }

    /// Makes the directory and those above it.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn make(&self) -> io::Result<()> {
        let way = way(&self.mount, &self.path);
        for (index, path) in way.iter().enumerate() {
            match fs::create_dir(path) {
                Ok(()) => self.prepare(path)?,
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error),
            }
            let is_above = index + 1 < way.len();
            if is_above && self.kind == Kind::V2 {
                pass_controllers_on(path);
            }
        }
        Ok(())
    }

    /// A new directory of cpuset, version 1, takes no process before it has CPUs and memory nodes.
    fn prepare(&self, path: &Path) -> io::Result<()> {
        if !self.kind.is_version_1_of("cpuset") {
            return Ok(());
        }
        for file in ["cpuset.cpus", "cpuset.mems"] {
            let own = fs::read_to_string(path.join(file))?;
            if own.trim().is_empty()
                && let Some(above) = path.parent()
            {
                fs::write(path.join(file), fs::read_to_string(above.join(file))?.trim())?;
            }
        }
        Ok(())
    }

    /// Moves the calling process there, which has one thread.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn enter(&self) -> io::Result<()> {
        // To move one thread costs the kernel much less than to move a process.
        let file = match &self.kind {
            Kind::V1(_) => "tasks",
            Kind::V2 => "cgroup.procs",
        };
        self.write(file, "0")
    }

    /// Writes a file of the directory, which is there already.
    ///
    /// # Errors
    /// The kernel refuses; `NotFound` if there is no such file.
    pub fn write(&self, file: &str, value: &str) -> io::Result<()> {
        use std::io::Write;

        let mut file = fs::OpenOptions::new().write(true).open(self.path.join(file))?;
        file.write_all(value.as_bytes())
    }

    /// How many of its processes were killed for want of memory, if its hierarchy counts that.
    pub fn oom_kills(&self) -> Option<u64> {
        let file = match &self.kind {
            kind if kind.is_version_1_of("memory") => "memory.oom_control",
            Kind::V1(_) => return None,
            Kind::V2 => "memory.events",
        };
        let text = fs::read_to_string(self.path.join(file)).ok()?;
        text.lines().find_map(|line| line.strip_prefix("oom_kill "))?.trim().parse().ok()
    }

    /// The CPU time that is in force, if its hierarchy limits that.
    pub fn cpu_time(&self) -> Option<CpuTime> {
        let read = |file: &str| fs::read_to_string(self.path.join(file)).ok();
        match &self.kind {
            kind if kind.is_version_1_of("cpu") => {
                let (quota, period) = (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?);
                let quota = if quota.starts_with('-') { "max" } else { quota.trim() };
                Some(CpuTime { quota: quota.to_owned(), period: period.trim().to_owned() })
            }
            Kind::V1(_) => None,
            Kind::V2 => {
                let text = read("cpu.max")?;
                let (quota, period) = text.trim().split_once(' ')?;
                Some(CpuTime { quota: quota.to_owned(), period: period.to_owned() })
            }
        }
    }

    /// The most memory in bytes that its processes may have, if its hierarchy limits that.
    pub fn memory_limit(&self) -> Option<u64> {
        let file = match &self.kind {
            kind if kind.is_version_1_of("memory") => "memory.limit_in_bytes",
            Kind::V1(_) => return None,
            Kind::V2 => "memory.max",
        };
        // Version 2 has a word for none, and version 1 the largest number of pages.
        let limit = fs::read_to_string(self.path.join(file)).ok()?.trim().parse().ok()?;
        (limit < 1 << 62).then_some(limit)
    }

    /// Kills every process in it and below it, but the calling one. Processes that can't be killed
    /// show when it is removed.
    pub fn kill(&self) {
        let holds_caller = pids(&self.path).contains(&nix::unistd::getpid().as_raw());
        if !holds_caller && self.write("cgroup.kill", "1").is_ok() {
            return;
        }
        self.thaw();
        kill_below(&self.path);
    }

    /// Lets processes go on that somebody has frozen: in version 1 not even a kill reaches them. That
    /// there are none is no error.
    pub fn thaw(&self) {
        if self.kind.is_version_1_of("freezer") {
            let _ = self.write("freezer.state", "THAWED");
        }
    }

    /// Removes what was made: the directory with what is below it, and those above it that nobody
    /// else uses by now. What is gone already is no error.
    ///
    /// # Errors
    /// `EBUSY` as long as there are processes in it.
    pub fn remove(&self) -> io::Result<()> {
        // A monitor that was killed may have left it; most have not.
        let _ = fs::remove_dir(self.beside());
        if !self.is_made() {
            return Ok(());
        }
        remove_with_children(&self.path)?;
        for above in self.made.iter().rev().skip(1) {
            if fs::remove_dir(above).is_err() {
                break;
            }
        }
        Ok(())
    }
}

/// Lets the directories below `path` have the controllers that it has. What it can't pass on, its
/// limits are left to the guest.
fn pass_controllers_on(path: &Path) {
    let available = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace().filter(|name| CONTROLLERS.contains(name)) {
        let written = fs::write(path.join("cgroup.subtree_control"), format!("+{controller}"));
        if let Err(error) = written {
            tracing::debug!(path = %path.display(), controller, %error, "controller not passed on");
        }
    }
}

/// The processes in a directory that this process can name.
fn pids(path: &Path) -> Vec<i32> {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid > 0).collect()
}

fn children(path: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(path).into_iter().flatten().flatten();
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    directories.map(|entry| entry.path()).collect()
}

fn kill_below(path: &Path) {
    children(path).iter().for_each(|child| kill_below(child));
    let own = nix::unistd::getpid();
    for pid in pids(path).into_iter().map(Pid::from_raw).filter(|pid| *pid != own) {
        // It may have ended meanwhile.
        let _ = kill(pid, Signal::SIGKILL);
    }
}

fn remove_with_children(path: &Path) -> io::Result<()> {
    for child in children(path) {
        remove_with_children(&child)?;
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_force_is_read_from_either_version() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let (mount, path) = (folder.path().to_owned(), folder.path().to_owned());
        for (file, text) in [
            ("cpu.cfs_quota_us", "-1\n"),
            ("cpu.cfs_period_us", "50000\n"),
            ("cpu.max", "25000 50000\n"),
        ] {
            fs::write(folder.path().join(file), text).expect("written");
        }
        let version_1 = |name: &str| Kind::V1(vec![name.to_owned()]);
        for (kind, expected) in [
            (Kind::V2, Some(("25000", "50000"))),
            (version_1("cpu"), Some(("max", "50000"))),
            (version_1("memory"), None),
        ] {
            let (mount, path) = (mount.clone(), path.clone());
            let found = Directory { kind, mount, path, made: Vec::new() }.cpu_time();
            let found = found.as_ref().map(|found| (&*found.quota, &*found.period));
            assert_eq!(found, expected);
        }
    }
}
