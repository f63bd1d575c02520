//! One directory of one cgroup hierarchy.

use std::fs::{self, DirBuilder, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::ensure;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::STEP;
use super::hierarchies::{Hierarchy, Kind, way};
use super::limits::CpuTime;

/// Controllers that limits need, version 2.
const CONTROLLERS: [&str; 5] = ["cpu", "cpuset", "io", "memory", "pids"];

/// How often a way is begun on which others remove directories, with a [`STEP`] between.
const ATTEMPTS: u32 = 20;
/// The mode of a directory that is made.
const MODE: u32 = 0o755;
/// What the mode of a sandbox's own has besides. Without it, who finds the directory just made couldn't
/// tell it from one that a caller has made for him.
const MARK: u32 = libc::S_ISVTX;

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
    /// The number of the inode of `path`, once that has been made: who comes later makes another.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    inode: Option<u64>,
}

/// Who makes a sandbox's directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Maker {
    /// The calling process alone: who else has made it is about to use it.
    Kiln,
    /// systemd as well, which has made it for this sandbox, or refused to.
    Systemd,
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
        let (kind, mount) = (hierarchy.kind.clone(), hierarchy.mount.clone());
        Self { kind, mount, path: full, made, inode: None }
    }

    /// The name of a directory beside it that is there for a moment at most, and that nobody else has.
    pub fn beside(&self) -> PathBuf {
        let mut name = self.path.file_name().unwrap_or_default().to_owned();
        name.push(".kiln-oom");
        self.path.with_file_name(name)
    }

    /// Whether the directory itself is made for the sandbox, or is to be.
    fn is_made(&self) -> bool {
        self.made.contains(&self.path)
    }

    /// Whether the directory that is there now is the sandbox's own.
    pub fn is_own(&self) -> bool {
        self.is_made() && !self.is_successors()
    }

    /// Whether the sandbox's own is gone, and somebody has made another of the same name.
    pub fn is_successors(&self) -> bool {
        let found = inode(&self.path).ok();
        self.is_made() && self.inode.is_some() && found.is_some() && found != self.inode
    }

    /// Refuses a directory that others use. One that was made for a container that has ended is removed, to
    /// be made anew: its maker knows the new one as a successor's.
    ///
    /// # Errors
    /// It holds processes, or another container is about to use it.
    pub fn free(&self) -> anyhow::Result<()> {
        let path = self.path.display();
        let count = pids(&self.path).len();
        ensure!(
            count == 0,
            "linux.cgroupsPath: container's cgroup is not empty: {path} holds {count} process(es)"
        );
        if is_marked(&self.path)
            && let Ok(directory) = File::open(&self.path)
        {
            // Whoever is about to use it has it locked; a process that is there already keeps it.
            let removed = directory.try_lock().is_ok() && fs::remove_dir(&self.path).is_ok();
            ensure!(
                removed || !self.path.exists(),
                "linux.cgroupsPath: {path} is in use by another container: name another path"
            );
        }
        Ok(())
    }

    /// Makes the directory and those above it. Whether or not it succeeds, from then on the directory
    /// counts as made only if it was. Until a process is in it, it is the caller's by the lock that is given.
    ///
    /// # Errors
    /// As mkdir(2); `AlreadyExists` if it did not exist when it was planned, and somebody other than
    /// `maker` has made it since.
    pub fn make(&mut self, maker: Maker) -> io::Result<Option<File>> {
        let mut made = self.make_way(maker);
        for _ in 1..ATTEMPTS {
            match &made {
                // A container that was the last to use a directory on the way has just removed it.
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    std::thread::sleep(STEP);
                    made = self.make_way(maker);
                }
                Ok(()) | Err(_) => break,
            }
        }
        if self.inode.is_none() {
            self.disown();
        }
        made?;
        if !self.is_made() {
            return Ok(None);
        }
        let claim = self.claim();
        if claim.is_none() {
            self.disown();
        }
        claim.map(Some).ok_or_else(|| ErrorKind::AlreadyExists.into())
    }

    /// Counts the directory itself as another's.
    fn disown(&mut self) {
        self.inode = None;
        self.made.retain(|path| *path != self.path);
    }

    /// Locks the directory that was made, if nobody has taken it for one that is left over.
    fn claim(&self) -> Option<File> {
        let directory = File::open(&self.path).ok()?;
        directory.try_lock().ok()?;
        let is_it = directory.metadata().is_ok_and(|found| Some(found.ino()) == self.inode);
        (is_it && inode(&self.path).ok() == self.inode).then_some(directory)
    }

    fn make_way(&mut self, maker: Maker) -> io::Result<()> {
        for path in way(&self.mount, &self.path) {
            let is_above = path != self.path;
            let mode = if is_above { MODE } else { MODE | MARK };
            match DirBuilder::new().mode(mode).create(&path) {
                Ok(()) => {
                    self.note(&path)?;
                    self.prepare(&path)?;
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                    if !is_above && self.inode.is_none() {
                        match maker {
                            Maker::Systemd if self.is_made() => self.note(&path)?,
                            Maker::Kiln if self.is_made() || is_marked(&path) => return Err(error),
                            Maker::Systemd | Maker::Kiln => {}
                        }
                    }
                    self.prepare(&path)?;
                }
                Err(error) => return Err(error),
            }
            if is_above && self.kind == Kind::V2 {
                pass_controllers_on(&path);
            }
        }
        Ok(())
    }

    /// Counts a directory on the way as made.
    fn note(&mut self, path: &Path) -> io::Result<()> {
        if !self.made.iter().any(|made| made == path) {
            self.made.push(path.to_owned());
            // What is above comes first.
            self.made.sort();
        }
        if path == self.path {
            self.inode = Some(inode(path)?);
        }
        Ok(())
    }

    /// A directory of cpuset, version 1, takes no process before it has CPUs and memory nodes, and has none
    /// that the directory above it doesn't have: whoever has made that may have left them out.
    fn prepare(&self, path: &Path) -> io::Result<()> {
        if !self.kind.is_version_1_of("cpuset") || path == self.mount {
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
        if !self.is_own() {
            return Ok(());
        }
        remove_with_children(&self.path)?;
        // By now somebody else may have made another of the same name.
        remove_empty(self.made.iter().rev().skip(1));
        Ok(())
    }

    /// Removes of what was to be made the directories that nobody uses.
    pub fn remove_unused(&self) {
        remove_empty(self.made.iter().rev());
    }
}

fn remove_empty<'a>(paths: impl Iterator<Item = &'a PathBuf>) {
    for path in paths {
        match fs::remove_dir(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => break,
            Ok(()) | Err(_) => {}
        }
    }
}

/// Whether a directory was made for a container.
fn is_marked(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.mode() & MARK != 0)
}

fn inode(path: &Path) -> io::Result<u64> {
    Ok(fs::symlink_metadata(path)?.ino())
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
            let found = Directory { kind, mount, path, made: Vec::new(), inode: None }.cpu_time();
            let found = found.as_ref().map(|found| (&*found.quota, &*found.period));
            assert_eq!(found, expected);
        }
    }

    /// A directory that is planned below one for the test.
    fn planned(folder: &Path, path: &str) -> Directory {
        let mount = folder.to_owned();
        let hierarchy = Hierarchy { kind: Kind::V2, own: mount.clone(), mount };
        Directory::plan(&hierarchy, Path::new(path))
    }

    #[test]
    fn directory_that_two_have_planned_is_its_makers() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let [mut first, mut second] = [(); 2].map(|()| planned(folder.path(), "/above/one"));
        first.make(Maker::Kiln).expect("made");
        let error = second.make(Maker::Kiln).expect_err("made by another");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists);
        assert!(first.is_own() && !second.is_made());
        second.remove().expect("left alone");
        second.remove_unused();
        assert!(first.path.exists());
        first.remove().expect("removed");
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0);
    }

    #[test]
    fn directory_that_systemd_has_made_is_its_sandboxs() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let mut directory = planned(folder.path(), "/one.slice/one.scope");
        fs::create_dir_all(&directory.path).expect("made");
        directory.make(Maker::Systemd).expect("made");
        assert!(directory.is_own());
        // One that was there before is not.
        let mut before = planned(folder.path(), "/one.slice/one.scope");
        before.make(Maker::Systemd).expect("there");
        before.remove().expect("left alone");
        assert!(!before.is_own() && directory.path.exists());
    }

    #[test]
    fn directory_of_a_callers_is_used_and_left() {
        let folder = tempfile::tempdir().expect("temporary directory");
        fs::create_dir_all(folder.path().join("above/one")).expect("made");
        let mut directory = planned(folder.path(), "/above/one");
        directory.make(Maker::Kiln).expect("there");
        directory.remove().expect("left alone");
        assert!(!directory.is_own() && directory.path.exists());
    }

    #[test]
    fn successor_of_the_same_name_is_left_alone() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let mut directory = planned(folder.path(), "/one");
        directory.make(Maker::Kiln).expect("made");
        // The old one stays somewhere, so that its inode is not used again.
        fs::rename(&directory.path, folder.path().join("gone")).expect("renamed");
        assert!(directory.is_own() && !directory.is_successors());
        fs::create_dir(&directory.path).expect("made");
        assert!(!directory.is_own() && directory.is_successors());
        directory.remove().expect("left alone");
        assert!(directory.path.exists());
    }

    #[test]
    fn plan_that_came_to_nothing_is_undone_as_far_as_it_is_unused() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let planned = planned(folder.path(), "/above/one");
        fs::create_dir_all(planned.path.join("in use")).expect("made");
        planned.remove_unused();
        assert!(planned.path.exists());
        fs::remove_dir(planned.path.join("in use")).expect("removed");
        planned.remove_unused();
        assert_eq!(fs::read_dir(folder.path()).expect("readable").count(), 0);
    }

    #[test]
    fn directories_on_the_way_may_go_while_others_are_made_in_them() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let come_and_go = &|name: &str| -> io::Result<()> {
            (0..300).try_for_each(|_| {
                let mut directory = planned(folder.path(), name);
                directory.make(Maker::Kiln).and_then(|_| directory.remove())
            })
        };
        std::thread::scope(|scope| {
            let containers = ["/above/one", "/above/two"];
            let threads = containers.map(|name| scope.spawn(move || come_and_go(name)));
            for thread in threads {
                thread.join().expect("no panic").expect("made and removed");
            }
        });
    }

    #[test]
    fn way_that_cannot_be_made_is_given_up() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let mut directory = planned(&folder.path().join("not mounted"), "/one");
        directory.mount.push("either");
        directory.path = directory.mount.join("one");
        let error = directory.make(Maker::Kiln).expect_err("no directory");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn every_directory_of_cpuset_on_the_way_has_cpus_and_nodes() {
        const FILES: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];
        let folder = tempfile::tempdir().expect("temporary directory");
        let mount = folder.path().to_owned();
        // Two that others have made: one limited, one left empty.
        let [limited, empty] = ["limited", "limited/empty"].map(|path| mount.join(path));
        for (path, cpus) in [(&mount, "0-3\n"), (&limited, "1\n"), (&empty, "\n")] {
            fs::create_dir_all(path).expect("made");
            FILES.iter().for_each(|file| fs::write(path.join(file), cpus).expect("written"));
        }
        let kind = Kind::V1(vec!["cpuset".to_owned()]);
        let hierarchy = Hierarchy { kind, own: mount.clone(), mount };
        let mut directory = Directory::plan(&hierarchy, Path::new("/limited/empty"));
        directory.make(Maker::Kiln).expect("there");
        for file in FILES {
            for path in [&limited, &empty] {
                assert_eq!(fs::read_to_string(path.join(file)).expect("read").trim(), "1");
            }
        }
    }
}
