//! Control groups (v2): the agent's own, which protects it, and one for each container.
//!
//! The guest's hierarchy belongs to the agent. Below its root are `agent`, whose memory is protected
//! and whose share of the processors is the greatest, and `container-<n>`. A container always has a
//! cgroup namespace, whether its configuration asks for one or not: the rest of the hierarchy is the
//! agent's, not a host's.

pub mod devices;
mod limits;
mod notices;
mod statistics;

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use kiln_protocol::Statistics;
pub use limits::Limits;
pub use notices::Notices;
use oci_spec::runtime::LinuxResources;

use crate::failure::Failure;

/// Memory that the kernel keeps for the agent, in bytes: several times what it uses.
const AGENT_MEMORY: &str = "16777216";

/// The guest's hierarchy.
#[derive(Debug)]
pub struct Hierarchy {
    root: PathBuf,
    next: u64,
}

impl Hierarchy {
    /// The hierarchy mounted at `root`.
    pub fn at(root: PathBuf) -> Self {
        Self { root, next: 0 }
    }

    /// Moves the calling process into `agent`, protects it and hands all controllers down.
    ///
    /// # Errors
    /// As the kernel's, for a file that should be there and can't be written.
    pub fn settle_agent(&self) -> io::Result<()> {
        let agent = self.root.join("agent");
        fs::create_dir_all(&agent)?;
        write_file(&agent.join("cgroup.procs"), "0")?;
        let controllers = fs::read_to_string(self.root.join("cgroup.controllers"))?;
        let enable: Vec<_> =
            controllers.split_whitespace().map(|name| format!("+{name}")).collect();
        write_file(&self.root.join("cgroup.subtree_control"), &enable.join(" "))?;
        for (file, value) in [("memory.min", AGENT_MEMORY), ("cpu.weight", "10000")] {
            let file = agent.join(file);
            if file.exists() {
                write_file(&file, value)?;
            }
        }
        Ok(())
    }

    /// A new, empty cgroup for a container.
    ///
    /// # Errors
    /// As mkdir(2).
    pub fn create(&mut self) -> io::Result<Cgroup> {
        let path = self.root.join(format!("container-{}-{}", std::process::id(), self.next));
        self.next += 1;
        fs::create_dir(&path)?;
        Ok(Cgroup { path })
    }
}

/// A container's cgroup. Dropping it kills what is in it and removes it.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Puts a process into the cgroup.
    ///
    /// # Errors
    /// `ESRCH` if it is gone.
    pub fn add(&self, pid: libc::pid_t) -> io::Result<()> {
        write_file(&self.path.join("cgroup.procs"), &pid.to_string())
    }

    /// Puts a process into the cgroup, or where `first`, a process of the container, is below it: a
    /// container that has cgroups of its own may have no process in the uppermost.
    ///
    /// # Errors
    /// `ESRCH` if it is gone.
    pub fn add_beside(&self, pid: libc::pid_t, first: libc::pid_t) -> io::Result<()> {
        match self.add(pid) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                let memberships = fs::read_to_string(format!("/proc/{first}/cgroup"))?;
                let below = self.below(&memberships).ok_or(error)?;
                write_file(&self.path.join(below).join("cgroup.procs"), &pid.to_string())
            }
            added => added,
        }
    }

    /// The path below this cgroup that the content of a `/proc/<pid>/cgroup` names.
    fn below(&self, memberships: &str) -> Option<PathBuf> {
        let path = memberships.lines().find_map(|line| line.strip_prefix("0::"))?;
        let name = self.path.file_name()?;
        let mut components = Path::new(path).components();
        components.by_ref().find(|component| component.as_os_str() == name)?;
        let below = components.as_path();
        let plain = |component| matches!(component, std::path::Component::Normal(_));
        below.components().all(plain).then(|| below.to_owned())
    }

    /// The processes in it and below it.
    ///
    /// # Errors
    /// As read(2).
    pub fn processes(&self) -> io::Result<Vec<libc::pid_t>> {
        let mut all = Vec::new();
        collect(&self.path, &mut all)?;
        Ok(all)
    }

    /// Kills every process in it and below it.
    ///
    /// # Errors
    /// As write(2).
    pub fn kill(&self) -> io::Result<()> {
        write_file(&self.path.join("cgroup.kill"), "1")
    }

    /// Has every process in it and below it stand still, or go on. It takes a while:
    /// [`Self::events`] has `frozen 1` once they do.
    ///
    /// # Errors
    /// As write(2).
    pub fn freeze(&self, still: bool) -> io::Result<()> {
        write_file(&self.path.join("cgroup.freeze"), if still { "1" } else { "0" })
    }

    /// What happens to its processes: `populated` and `frozen`.
    ///
    /// # Errors
    /// As open(2).
    pub fn events(&self) -> io::Result<Notices> {
        Notices::open(&self.path.join("cgroup.events"))
    }

    /// What happens to its memory, such as `oom_kill`.
    ///
    /// # Errors
    /// `NotFound` where the kernel doesn't control the memory of cgroups.
    pub fn memory_events(&self) -> io::Result<Notices> {
        Notices::open(&self.path.join("memory.events"))
    }

    /// What the kernel has counted.
    pub fn statistics(&self) -> Statistics {
        statistics::read(&self.path)
    }

    /// Writes limits.
    ///
    /// # Errors
    /// The first that the kernel doesn't take, by field.
    pub fn limit(&self, limits: &Limits) -> Result<(), Failure> {
        limits.write(&self.path)
    }

    /// Allows the container's processes the devices of its rules, and no others.
    ///
    /// # Errors
    /// As [`devices::Program::attach`].
    pub fn restrict_devices(&self, rules: &devices::Program) -> io::Result<()> {
        rules.attach(fs::File::open(&self.path)?.as_fd())
    }

    /// Changes the limits that are set in `resources`, all or none of them. `cpus` is the guest's
    /// number of processors.
    ///
    /// Where memory is to be less than what is in use, the kernel takes it back before this returns.
    ///
    /// # Errors
    /// A limit that can't be honoured or that the kernel doesn't take, by field.
    pub fn update(&self, resources: &LinuxResources, cpus: usize) -> Result<(), Failure> {
        Limits::of_update(resources, cpus, &self.path)?.replace(&self.path)
    }

    /// Gives the cgroup to a user, as the root of a hierarchy of its own (the files that
    /// /sys/kernel/cgroup/delegate lists).
    ///
    /// # Errors
    /// As chown(2).
    pub fn delegate(&self, uid: u32, gid: u32) -> io::Result<()> {
        chown(&self.path, Some(uid), Some(gid))?;
        for file in ["cgroup.procs", "cgroup.threads", "cgroup.subtree_control"] {
            chown(self.path.join(file), Some(uid), Some(gid))?;
        }
        Ok(())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Nothing to be done about a failure: an empty cgroup that stays costs nothing until the
        // guest ends.
        let _ = self.kill();
        for _ in 0..REMOVE_ATTEMPTS {
            if remove(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }
}

/// A killed process leaves its cgroup a moment after it is reaped.
const REMOVE_ATTEMPTS: usize = 20;

fn collect(path: &Path, all: &mut Vec<libc::pid_t>) -> io::Result<()> {
    let processes = match fs::read_to_string(path.join("cgroup.procs")) {
        // The processes of threaded cgroups are those of one above.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => String::new(),
        read => read?,
    };
    all.extend(processes.lines().filter_map(|line| line.parse::<libc::pid_t>().ok()));
    for below in directories(path)? {
        collect(&below, all)?;
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    for below in directories(path)? {
        remove(&below)?;
    }
    fs::remove_dir(path)
}

fn directories(path: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = fs::read_dir(path)?.filter_map(Result::ok);
    let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    Ok(directories.map(|entry| entry.path()).collect())
}

/// Writes to a file that exists: cgroupfs answers an attempt to create one with `EACCES`.
fn write_file(path: &Path, value: &str) -> io::Result<()> {
    let mut file = fs::File::options().write(true).open(path)?;
    file.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_below_a_containers_cgroup_is_read_from_the_kernels_words() {
        // Dropping it is harmless: there is no such cgroup.
        let cgroup = Cgroup { path: "/nowhere/container-1-2".into() };
        let below = |memberships| cgroup.below(memberships);
        let cases = [
            ("3:cpu:/x\n0::/container-1-2/init.scope\n", Some("init.scope")),
            ("0::/outer/container-1-2/a/b\n", Some("a/b")),
            ("0::/container-1-2\n", Some("")),
            ("0::/container-1-2/../agent\n", None),
            ("0::/container-1-23/a\n", None),
            ("1:cpu:/container-1-2/a\n", None),
        ];
        for (memberships, expected) in cases {
            assert_eq!(below(memberships).as_deref(), expected.map(Path::new), "{memberships:?}");
        }
    }
}
