//! The host's processes of a sandbox are in the cgroup that the bundle names, and go with it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::lifecycle::{create, kiln, succeeds, wait_for, wait_for_output};
use crate::run::{eventually, processes_of};
use crate::stage::{Stage, errors};

const ROOT: &str = "/sys/fs/cgroup";

/// A process's cgroup by the hierarchy's controllers, of those hierarchies that are mounted.
fn cgroups_of(pid: impl std::fmt::Display) -> BTreeMap<String, String> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroups");
    let all = text.lines().map(|line| {
        let (controllers, path) = line.split_once(':')?.1.split_once(':')?;
        Some((controllers.to_owned(), path.to_owned()))
    });
    all.map(|entry| entry.expect("a line")).collect()
}

/// Every directory of the host's hierarchies that has this path.
fn directories(path: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let points = mounts.lines().filter_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let point = fields.next()?;
        fields.next()?.starts_with("cgroup").then(|| point.to_owned() + path)
    });
    points.map(PathBuf::from).filter(|path| path.exists()).collect()
}

/// The value of a limit, from the controller's hierarchy of version 1 or that of version 2.
pub fn limit(controller: &str, path: &str, v1: &str, v2: &str) -> String {
    let files = [format!("{ROOT}/{controller}{path}/{v1}"), format!("{ROOT}{path}/{v2}")];
    let found = files.iter().find_map(|file| fs::read_to_string(file).ok());
    found.unwrap_or_else(|| panic!("none of {files:?}")).trim().to_owned()
}

/// A path that no other test has.
pub fn unique(name: &str) -> String {
    format!("/kiln-test-{}-{name}", std::process::id())
}

pub fn set_path(stage: &Stage, path: &str) {
    stage.edit(|config| config["linux"]["cgroupsPath"] = json!(path));
}

fn is_running(stage: &Stage) -> bool {
    stage.root().join("test/state.json").exists() && stage.state()["status"] == "running"
}

/// A process in a directory of every hierarchy.
struct Stray(Child);

impl Stray {
    fn in_cgroup(path: &str) -> Self {
        let sleep = Command::new("sleep").arg("1000").spawn().expect("sleep");
        for directory in directories(path) {
            let written = fs::write(directory.join("cgroup.procs"), sleep.id().to_string());
            written.expect("moved");
        }
        Self(sleep)
    }

    fn lives(&mut self) -> bool {
        self.0.try_wait().expect("a child").is_none()
    }
}

impl Drop for Stray {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn every_process_is_in_the_named_cgroup_with_limits_and_delete_removes_it() {
    let stage = Stage::new(&["sleep", "1000"]);
    let (parent, path) = (unique("named"), unique("named") + "/c1");
    set_path(&stage, &path);
    stage.edit(|config| {
        config["linux"]["resources"] = json!({
            "memory": {"limit": 256 << 20},
            "pids": {"limit": 50},
            "cpu": {"shares": 512, "quota": 150_000, "period": 100_000},
        });
    });
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));

    let monitor = stage.state()["pid"].to_string();
    assert!(cgroups_of(&monitor).values().any(|found| *found == path));
    let made = directories(&path);
    for (controllers, found) in cgroups_of(&monitor) {
        // Others are of hierarchies that aren't mounted.
        assert!(found == path || cgroups_of("self")[&controllers] == found, "{controllers}");
    }
    let processes = processes_of(&stage);
    assert!(processes.len() >= 4, "monitor, file system, devices, QEMU: {processes:?}");
    for pid in processes {
        assert_eq!(cgroups_of(pid), cgroups_of(&monitor), "process {pid}");
    }

    // The guest has 256 MiB, a 32nd of that and 96 MiB, its files as much again; the emulated engine
    // 256 + 1024 MiB.
    let memory = (2 * (256 + 8 + 96) + 256 + 1024) << 20;
    assert_eq!(limit("memory", &path, "memory.limit_in_bytes", "memory.max"), memory.to_string());
    assert_eq!(limit("pids", &path, "pids.max", "pids.max"), (50 + 512).to_string());
    let quota = limit("cpu", &path, "cpu.cfs_quota_us", "cpu.max");
    assert!(quota == "150000" || quota == "150000 100000", "{quota}");

    // The paths of the host are not those of the container, which may have the same.
    let update =
        ["update", "--memory", "128m", "--pids-limit", "60", "--cpu-quota", "50000", "test"];
    succeeds(&stage, &update);
    // The machine is what it was.
    assert_eq!(limit("memory", &path, "memory.limit_in_bytes", "memory.max"), memory.to_string());
    assert_eq!(limit("pids", &path, "pids.max", "pids.max"), (60 + 512).to_string());
    let quota = limit("cpu", &path, "cpu.cfs_quota_us", "cpu.max");
    assert!(quota == "50000" || quota == "50000 100000", "{quota}");

    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(!made.is_empty() && directories(&parent).is_empty(), "{:?}", directories(&parent));
    assert!(stage.is_clean());
}

#[test]
fn without_a_path_it_is_below_the_callers_own_and_goes_with_the_run() {
    let stage = Stage::new(&["sh", "-c", "echo up; cat"]);
    let own = cgroups_of("self");
    let mut run = stage.kiln();
    run.args(["--systemd-cgroup", "run", "--engine", "emulated", "--bundle"]).arg(stage.bundle());
    run.arg("test").stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = run.spawn().expect("kiln");
    eventually("the start", || is_running(&stage));
    let monitor = stage.state()["pid"].to_string();
    let mut below = Vec::new();
    for (controllers, found) in cgroups_of(&monitor) {
        if found != own[&controllers] {
            let name =
                Path::new(&found).file_name().expect("a name").to_string_lossy().into_owned();
            assert!(
                name == "test" || name == format!("test.{monitor}") || name == "kiln-test.scope"
            );
            below.extend(directories(&found));
        }
    }
    assert!(!below.is_empty());
    drop(child.stdin.take());
    assert!(child.wait().expect("ends").success());
    assert!(below.iter().all(|path| !path.exists()), "{below:?}");
    assert!(stage.is_clean());
}

#[test]
fn memory_that_runs_out_in_the_guest_is_counted_by_the_hosts_cgroup() {
    let counted = |path: &str| {
        let text = limit("memory", path, "memory.oom_control", "memory.events");
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.and_then(|count| count.parse::<u64>().ok()).expect("a count")
    };
    let hog = "dd if=/dev/zero of=/dev/null bs=112M count=1";
    let resources = json!({"memory": {"limit": 64 << 20}});
    let path = unique("full");
    // The container itself ends by it: whoever waits for that finds the count.
    let stage = Stage::new(&["sh", "-c", &format!("exec {hog}")]);
    set_path(&stage, &path);
    stage.edit(|config| config["linux"]["resources"] = resources);
    let output = stage.run(&["--keep"]).stdin(Stdio::null()).output().expect("kiln");
    assert_eq!(output.status.code(), Some(137), "{}", errors(&output));
    assert_eq!(counted(&path), 1, "{}", errors(&output));
    assert_eq!(stage.state()["annotations"]["io.kiln.oom-killed"], "1");
    succeeds(&stage, &["delete", "test"]);
    assert_eq!(directories(&path), Vec::<PathBuf>::new());

    // Others in it do, one after the other, and it lives on.
    let script = format!("{hog} & {hog} & wait; echo lost; sleep 1000");
    stage.edit(|config| config["process"]["args"] = json!(["sh", "-c", script]));
    assert!(create(&stage, &[]).status.success());
    succeeds(&stage, &["start", "test"]);
    wait_for_output(&stage, "lost");
    // One count may stand for several.
    eventually("the count", || counted(&path) > 0);
    assert!(is_running(&stage) && counted(&path) <= 2);
    let beside = path.clone() + ".kiln-oom";
    eventually("the end of what it takes", || directories(&beside).is_empty());
    succeeds(&stage, &["delete", "--force", "test"]);
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    assert!(stage.is_clean());
}

#[test]
fn cgroup_with_processes_is_refused_and_left_alone() {
    let stage = Stage::new(&["true"]);
    let path = unique("taken");
    let mounted: Vec<_> = directories("");
    assert!(!mounted.is_empty(), "no cgroups here");
    for root in mounted {
        // The one of CPU sets takes processes only once it has CPUs.
        if !root.join("cpuset.cpus").exists() {
            fs::create_dir(root.join(&path[1..])).expect("made");
        }
    }
    let mut stray = Stray::in_cgroup(&path);
    set_path(&stage, &path);
    let output = create(&stage, &[]);
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("linux.cgroupsPath") && errors.contains("not empty"), "{errors}");
    assert!(stage.is_clean());
    assert!(stray.lives());
    drop(stray);
    let left = directories(&path);
    assert!(!left.is_empty());
    eventually("an empty cgroup", || left.iter().all(|path| fs::remove_dir(path).is_ok()));
}

#[test]
fn delete_leaves_whoever_has_the_cgroup_by_now_alone() {
    let stage = Stage::new(&["true"]);
    let path = unique("ended");
    set_path(&stage, &path);
    let output = stage.run(&["--keep"]).output().expect("kiln");
    assert!(output.status.success(), "{}", errors(&output));
    let other = Stage::new(&["true"]);
    set_path(&other, &path);
    let output = create(&other, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    succeeds(&stage, &["delete", "test"]);
    assert_eq!(other.state()["status"], "created");
    assert!(stage.is_clean() && !directories(&path).is_empty());
    succeeds(&other, &["delete", "--force", "test"]);
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    assert!(other.is_clean());
}

#[test]
fn of_two_that_want_one_cgroup_at_once_none_harms_the_other() {
    let path = unique("both");
    let stages = [(); 2].map(|()| Stage::new(&["true"]));
    let runs = stages.each_ref().map(|stage| {
        set_path(stage, &path);
        let mut run = stage.run(&[]);
        run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        run.spawn().expect("kiln")
    });
    let outputs = runs.map(|run| run.wait_with_output().expect("ends"));
    assert!(outputs.iter().any(|output| output.status.success()), "{outputs:?}");
    for output in outputs.iter().filter(|output| !output.status.success()) {
        assert!(errors(output).contains(&path), "{}", errors(output));
    }
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    assert!(stages.iter().all(Stage::is_clean));
}

#[test]
fn what_a_crash_leaves_in_the_cgroup_is_killed_by_delete() {
    let stage = Stage::new(&["sleep", "1000"]);
    let path = unique("crashed");
    set_path(&stage, &path);
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let mut stray = Stray::in_cgroup(&path);
    let monitor = stage.state()["pid"].to_string();
    assert!(Command::new("kill").args(["-KILL", &monitor]).status().expect("kill").success());
    wait_for(&stage, "stopped");
    assert!(!directories(&path).is_empty() && stray.lives());
    succeeds(&stage, &["delete", "test"]);
    assert!(!stray.lives());
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    assert!(stage.is_clean());
}

#[test]
fn delete_cleans_up_when_everything_was_killed_at_once() {
    let stage = Stage::new(&["sleep", "1000"]);
    let path = unique("killed");
    set_path(&stage, &path);
    let mut run = stage.run(&[]);
    run.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut command = run.spawn().expect("kiln");
    eventually("the start", || is_running(&stage));
    let all: Vec<_> = processes_of(&stage).iter().map(i32::to_string).collect();
    assert!(all.len() >= 5, "command, monitor, file system, devices, QEMU: {all:?}");
    assert!(Command::new("kill").arg("-KILL").args(&all).status().expect("kill").success());
    command.wait().expect("ends");
    assert!(!directories(&path).is_empty());
    succeeds(&stage, &["delete", "--force", "test"]);
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    assert!(stage.is_clean() && !mounts.contains(&stage.path().display().to_string()));
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn failed_create_leaves_no_cgroup() {
    let stage = Stage::new(&["nosuchprogram"]);
    let path = unique("failed");
    set_path(&stage, &path);
    assert_eq!(create(&stage, &[]).status.code(), Some(1));
    assert_eq!(directories(&path), Vec::<PathBuf>::new());
    assert!(stage.is_clean());
}

#[test]
fn scope_is_refused_where_systemd_does_not_run() {
    let stage = Stage::new(&["true"]);
    set_path(&stage, "system.slice:kiln:test");
    let mut command = Command::new("unshare");
    let hide = "[ ! -d /run/systemd ] || mount -t tmpfs none /run/systemd; exec \"$@\"";
    command.args(["--mount", "sh", "-c", hide, "sh", env!("CARGO_BIN_EXE_kiln"), "--root"]);
    command.arg(stage.root()).arg("--lib-dir").arg(crate::stage::lib_dir());
    command.args(["--systemd-cgroup", "run", "--engine", "emulated"]);
    let output = command.arg("--bundle").arg(stage.bundle()).arg("test").output().expect("unshare");
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("systemd does not run on this host"), "{errors}");
    assert!(stage.is_clean());

    set_path(&stage, "system.slice:kiln:");
    let output = kiln(
        &stage,
        &["--systemd-cgroup", "run", "--bundle", &stage.bundle().display().to_string(), "test"],
    );
    assert!(crate::stage::errors(&output).contains("linux.cgroupsPath"));
}
