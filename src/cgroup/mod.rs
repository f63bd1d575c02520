//! The cgroup of the host that a sandbox's processes are in.
//!
//! Callers name it (`linux.cgroupsPath`), look into it for figures and OOM kills, and find it again
//! by `/proc/PID/cgroup`. It holds the monitor and everything that the monitor starts, and the
//! processes that stand for execs.
//!
//! * [`hierarchies`]: what is mounted: version 1, version 2 or both.
//! * [`path`]: what `linux.cgroupsPath` asks for.
//! * [`limits`]: what the host limits, and to what.
//! * [`directory`]: one directory of one hierarchy.
//! * [`systemd`]: scopes, where systemd manages the host's cgroups.
//! * [`oom`]: a kill for want of memory in the guest, counted on the host.
//! * [`victim`]: whom the host's kernel kills for that.
//!
//! # Promises
//! A directory that holds processes already is refused. One that was made for a container (its sticky bit
//! says so, which mkdir(2) sets and nobody else has a use for) is made anew if nothing is in it, and
//! refused if its maker is about to enter it (it is locked until then): all processes in a container's
//! own are its own. What is made is written down twice. The first time is before it is made, so that it
//! can be found after a crash; what of that is empty is removed. The second time is before a process
//! enters it, when it is sure who has made it; that is removed with all processes in it, and no others are
//! killed. A hierarchy in which the caller may make no directories is left out, with a warning.

mod directory;
mod hierarchies;
mod limits;
mod oom;
mod path;
mod systemd;
mod victim;

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use self::directory::{Directory, Maker};
use self::hierarchies::{Hierarchy, Kind};
pub use self::limits::{Limits, Machine, Setting};
use self::path::Scope;
pub use self::path::Wanted;
pub use self::systemd::is_running as systemd_runs;
pub use self::victim::{VictimConfig, run as run_victim};

/// How long killed processes may take to be gone.
const PATIENCE: Duration = Duration::from_secs(10);
const STEP: Duration = Duration::from_millis(2);

/// A sandbox's cgroup: a directory in each hierarchy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cgroup {
    directories: Vec<Directory>,
    /// The scope that systemd has made, by its unit's name.
    unit: Option<String>,
    /// It is to be made: somebody else may have been faster.
    #[serde(default, skip_serializing_if = "is_false")]
    planned: bool,
}

fn is_false(value: &bool) -> bool {
    !value
}

/// A cgroup that is to be made.
#[derive(Debug)]
pub struct Plan {
    cgroup: Cgroup,
    scope: Option<Scope>,
    id: String,
    /// The locks of what was made, until processes are there.
    claims: Vec<File>,
}

impl Plan {
    /// Decides where the cgroup of container `id` will be, and which directories that takes.
    ///
    /// # Errors
    /// There is no `/proc`, or no systemd for a scope that was asked for by name.
    pub fn new(wanted: &Wanted, id: &str) -> anyhow::Result<Self> {
        let hierarchies = hierarchies::find().context("cgroup hierarchies")?;
        let plan = |path: &Path, scope| {
            let directories = hierarchies.iter().map(|h| Directory::plan(h, path)).collect();
            let cgroup = Cgroup { directories, unit: None, planned: true };
            Self { cgroup, scope, id: id.to_owned(), claims: Vec::new() }
        };
        match wanted {
            Wanted::Default => Ok(plan(&free_name(&hierarchies, id), None)),
            Wanted::Path(path) => Ok(plan(path, None)),
            Wanted::Scope(scope) if systemd::is_running() => {
                let mut plan = plan(&scope.path(), Some(scope.clone()));
                plan.cgroup.unit = Some(scope.unit.clone());
                Ok(plan)
            }
            Wanted::Scope(scope) => bail!(
                "linux.cgroupsPath: systemd does not run on this host, so it cannot make {}: leave \
                 --systemd-cgroup out, or have the caller manage cgroups by itself (cgroupfs)",
                scope.unit
            ),
        }
    }

    /// What is to be written down: before [`make`](Self::make) what is planned, after it, whether or not it
    /// succeeds, what has been made.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Makes the directories. systemd moves the calling process into a scope.
    ///
    /// # Errors
    /// Others use it, or are about to, or the file system refuses. What has been made is
    /// left to [`Cgroup::remove`].
    pub fn make(&mut self) -> anyhow::Result<()> {
        let planned = std::mem::take(&mut self.cgroup);
        for directory in &planned.directories {
            directory.free()?;
        }
        let mut maker = Maker::Kiln;
        if let Some(scope) = &self.scope {
            systemd::start(scope, &format!("kiln container {}", self.id))
                .context("linux.cgroupsPath")?;
            self.cgroup.unit = planned.unit;
            systemd::await_move(scope).context("linux.cgroupsPath")?;
            maker = Maker::Systemd;
        }
        for mut directory in planned.directories {
            let made = directory.make(maker).map(|claim| self.claims.extend(claim));
            let path = directory.path.clone();
            match &made {
                Err(error) if is_forbidden(error) => {
                    tracing::warn!(
                        path = %path.display(), %error,
                        "no right to make a cgroup there: the host does not account for this sandbox"
                    );
                    continue;
                }
                Ok(()) | Err(_) => self.cgroup.directories.push(directory),
            }
            made.map_err(|error| match error.kind() {
                ErrorKind::AlreadyExists => anyhow!(
                    "cgroup {}: another container has just made it: try again, or give each a \
                     linux.cgroupsPath of its own",
                    path.display()
                ),
                _ => anyhow::Error::new(error).context(format!("cgroup {}", path.display())),
            })?;
        }
        Ok(())
    }
}

/// The container's id below the caller's own cgroup, as with runc; with this process's id behind it
/// if that exists.
fn free_name(hierarchies: &[Hierarchy], id: &str) -> PathBuf {
    let taken = hierarchies.iter().any(|h| directory::below_own(h, Path::new(id)).exists());
    match taken {
        true => format!("{id}.{}", std::process::id()).into(),
        false => id.into(),
    }
}

fn is_forbidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM | libc::EROFS))
}

impl Cgroup {
    /// Moves the calling process there, which has one thread.
    ///
    /// # Errors
    /// The kernel refuses, or it is gone.
    pub fn enter(&self) -> anyhow::Result<()> {
        for directory in &self.directories {
            let named = || format!("cgroup {}", directory.path.display());
            directory.enter().with_context(named)?;
        }
        Ok(())
    }

    /// Sets limits. A limit for which the host has no controller is kept by the guest alone, with a
    /// warning.
    ///
    /// # Errors
    /// The kernel refuses a value; the field is named.
    pub fn apply(&self, limits: &[Setting]) -> anyhow::Result<()> {
        let in_force = self.directories.iter().find_map(Directory::cpu_time).unwrap_or_default();
        let limits: Vec<_> = limits.iter().map(|limit| limit.completed(&in_force)).collect();
        if let Some(unit) = &self.unit {
            systemd::limit(unit, &limits).context("linux.resources")?;
        }
        // With version 1 memory's limit is never above that of memory and swap: one order is for lowering
        // both, the other for raising them.
        let refused = limits.iter().filter(|setting| self.set(setting).is_err());
        let refused: Vec<_> = refused.collect();
        refused.into_iter().try_for_each(|setting| self.set(setting))
    }

    fn set(&self, setting: &Setting) -> anyhow::Result<()> {
        let mut applies = false;
        for directory in &self.directories {
            let (file, value) = match (&directory.kind, &setting.v1, &setting.v2) {
                (Kind::V1(controllers), Some((controller, file, value)), _)
                    if controllers.contains(controller) =>
                {
                    (file, value)
                }
                (Kind::V2, _, Some((file, value))) => (file, value),
                _ => continue,
            };
            match directory.write(file, value) {
                Ok(()) => return Ok(()),
                // The controller is in another hierarchy, or this kernel has no such limit.
                Err(error) if error.kind() == ErrorKind::NotFound => applies = true,
                Err(error) if is_forbidden(&error) => applies = true,
                Err(error) => {
                    let path = directory.path.join(file);
                    return Err(error).with_context(|| {
                        format!("linux.resources.{}: {value} in {}", setting.field, path.display())
                    });
                }
            }
        }
        if applies {
            let field = &setting.field;
            tracing::warn!(
                "linux.resources.{field}: no such limit on this host: the guest keeps it"
            );
        }
        Ok(())
    }

    /// Lets its processes go on if somebody has frozen them.
    pub fn thaw(&self) {
        self.directories.iter().filter(|directory| directory.is_own()).for_each(Directory::thaw);
    }

    /// How many of its processes the host's kernel has killed for want of memory.
    pub fn oom_kills(&self) -> u64 {
        self.directories.iter().filter_map(Directory::oom_kills).max().unwrap_or(0)
    }

    /// The most memory in bytes that its processes may have, if there is such a limit.
    pub fn memory_limit(&self) -> Option<u64> {
        self.directories.iter().find_map(Directory::memory_limit)
    }

    /// Kills what is left in the directories that were made, and removes them.
    ///
    /// # Errors
    /// A process does not end, or the file system refuses; with the directory's name.
    pub fn remove(&self) -> io::Result<()> {
        if self.planned {
            // No process was to enter yet, and a scope with none in it goes by itself.
            self.directories.iter().for_each(Directory::remove_unused);
            return Ok(());
        }
        let is_successors = self.directories.iter().any(Directory::is_successors);
        let deadline = Instant::now() + PATIENCE;
        let leaves = || self.directories.iter().filter(|directory| directory.is_own());
        loop {
            leaves().for_each(Directory::kill);
            let left = leaves().find_map(|directory| Some((directory, directory.remove().err()?)));
            let Some((directory, error)) = left else { break };
            let is_busy = matches!(error.raw_os_error(), Some(libc::EBUSY | libc::ENOTEMPTY));
            if !is_busy || Instant::now() > deadline {
                let named = format!("cgroup {}: {error}", directory.path.display());
                return Err(io::Error::new(error.kind(), named));
            }
            std::thread::sleep(STEP);
        }
        // A scope that has gone by itself may have a successor of the same name.
        if let Some(unit) = self.unit.as_ref().filter(|_| !is_successors) {
            systemd::stop(unit);
        }
        Ok(())
    }
}

/// Where the calling process is, to go back to.
///
/// The files are opened beforehand, since the kernel looks at who opened them: a process that has
/// entered a cgroup namespace can't open its way out of it.
#[derive(Debug)]
pub struct Origin {
    processes: Vec<File>,
    namespace: Option<File>,
}

impl Origin {
    /// Where it is now.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn here() -> anyhow::Result<Self> {
        let hierarchies = hierarchies::find().context("cgroup hierarchies")?;
        let open = |hierarchy: Hierarchy| {
            File::options().write(true).open(hierarchy.own.join("cgroup.procs")).ok()
        };
        let processes = hierarchies.into_iter().filter_map(open).collect();
        // A kernel may have none.
        let namespace = File::open("/proc/self/ns/cgroup").ok();
        Ok(Self { processes, namespace })
    }

    /// Has the calling thread see cgroups from where it was: where version 2 is mounted with
    /// `nsdelegate`, as systemd mounts it, nobody sets a limit of the cgroup that is the root of his
    /// namespace. Whoever has no right to go there had none to leave.
    pub fn lend_view(&self) {
        if let Some(namespace) = &self.namespace
            && let Err(error) = setns(namespace, CloneFlags::CLONE_NEWCGROUP)
        {
            tracing::debug!(%error, "cgroup namespace");
        }
    }

    /// Moves the calling process back, with all of its threads, wherever that is still possible.
    pub fn go_back(&self) {
        for mut file in &self.processes {
            if let Err(error) = file.write_all(b"0") {
                tracing::debug!(%error, "cannot go back to a cgroup");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// A plan for `one` below a directory that stands for a hierarchy's mount.
    fn plan(mount: &Path) -> Plan {
        let hierarchy = Hierarchy { kind: Kind::V2, own: mount.into(), mount: mount.into() };
        let directories = vec![Directory::plan(&hierarchy, Path::new("/one"))];
        let cgroup = Cgroup { directories, unit: None, planned: true };
        Plan { cgroup, scope: None, id: "c1".to_owned(), claims: Vec::new() }
    }

    /// A process that the directory says is in it.
    fn process_in(mount: &Path) -> Child {
        let process = Command::new("/bin/sleep").arg("1000").spawn().expect("a process");
        let file = mount.join("one/cgroup.procs");
        std::fs::write(file, process.id().to_string()).expect("written");
        process
    }

    fn end(mut process: Child) {
        assert!(process.try_wait().expect("a child").is_none(), "it was killed");
        process.kill().expect("killed");
        process.wait().expect("reaped");
    }

    #[test]
    fn refused_container_kills_nobody_who_was_faster() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let (mut first, mut second) = (plan(folder.path()), plan(folder.path()));
        let written_down = second.cgroup().clone();
        first.make().expect("made");
        let error = second.make().expect_err("made by another").to_string();
        assert!(error.contains("another container"), "{error}");
        let process = process_in(folder.path());
        // It was refused, or was killed before it knew; another is refused for the process.
        let mut third = plan(folder.path());
        assert!(third.make().expect_err("in use").to_string().contains("not empty"));
        for cgroup in [&written_down, second.cgroup(), third.cgroup()] {
            cgroup.remove().expect("nothing to remove");
        }
        end(process);
        std::fs::remove_file(folder.path().join("one/cgroup.procs")).expect("removed");
        first.cgroup().remove().expect("removed");
        assert!(!folder.path().join("one").exists());
    }

    #[test]
    fn cgroup_of_a_container_that_has_ended_is_made_anew() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let mut first = plan(folder.path());
        first.make().expect("made");
        let written_down = first.cgroup().clone();
        // It is about to be entered.
        let error = plan(folder.path()).make().expect_err("in use").to_string();
        assert!(error.contains("linux.cgroupsPath") && error.contains("in use"), "{error}");
        drop(first);
        // Its inode's number is not used again while somebody has it open.
        let _old = File::open(folder.path().join("one")).expect("there");
        let mut second = plan(folder.path());
        second.make().expect("made anew");
        let process = process_in(folder.path());
        written_down.remove().expect("nothing to remove");
        end(process);
        std::fs::remove_file(folder.path().join("one/cgroup.procs")).expect("removed");
        second.cgroup().remove().expect("removed");
        assert!(!folder.path().join("one").exists());
    }

    #[test]
    fn cgroup_that_a_caller_has_made_is_used_and_left() {
        let folder = tempfile::tempdir().expect("temporary directory");
        std::fs::create_dir(folder.path().join("one")).expect("made");
        let mut plan = plan(folder.path());
        plan.make().expect("there");
        let process = process_in(folder.path());
        plan.cgroup().remove().expect("nothing to remove");
        end(process);
    }

    #[test]
    fn what_was_written_down_without_inodes_is_read() {
        let text = r#"{"directories": [{"kind": "v2", "mount": "/m", "path": "/m/a", "made": ["/m/a"]}],
            "unit": null}"#;
        let cgroup: Cgroup = serde_json::from_str(text).expect("read");
        assert!(!cgroup.planned && cgroup.directories[0].is_own());
    }
}
