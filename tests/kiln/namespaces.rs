//! The process that stands for a container is in the namespaces of the host that the bundle asks for.

use std::fs;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use crate::lifecycle::{create, succeeds};
use crate::run::eventually;
use crate::stage::{Stage, errors};

fn namespace_of(pid: impl std::fmt::Display, kind: &str) -> String {
    let link = fs::read_link(format!("/proc/{pid}/ns/{kind}"));
    link.expect("namespace").to_string_lossy().into_owned()
}

/// A process in namespaces of its own, which are there as long as it is.
struct Holder(Child);

impl Holder {
    fn new() -> Self {
        let mut unshare = Command::new("unshare");
        unshare.args(["--net", "--ipc", "--uts", "sleep", "1000"]);
        let holder = Self(unshare.spawn().expect("unshare"));
        let own = namespace_of("self", "uts");
        eventually("new namespaces", || namespace_of(holder.0.id(), "uts") != own);
        holder
    }

    fn path(&self, kind: &str) -> String {
        format!("/proc/{}/ns/{kind}", self.0.id())
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn set_namespaces(stage: &Stage, namespaces: Value) {
    stage.edit(|config| config["linux"]["namespaces"] = namespaces);
}

#[test]
fn monitor_joins_what_a_path_names_and_makes_the_rest() {
    let holder = Holder::new();
    let stage = Stage::new(&["sleep", "1000"]);
    stage.edit(|config| {
        config["hostname"] = json!("inside");
        config["process"]["oomScoreAdj"] = json!(500);
    });
    set_namespaces(
        &stage,
        json!([
            {"type": "pid"}, {"type": "mount"}, {"type": "uts"},
            {"type": "network", "path": holder.path("net")},
            {"type": "ipc", "path": holder.path("ipc")},
        ]),
    );
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let pid = stage.state()["pid"].to_string();
    let score = fs::read_to_string(format!("/proc/{pid}/oom_score_adj"));
    assert_eq!(score.expect("score"), "500\n");
    for kind in ["net", "ipc"] {
        assert_eq!(namespace_of(&pid, kind), namespace_of(holder.0.id(), kind), "{kind}");
    }
    for other in ["self", &holder.0.id().to_string()] {
        assert_ne!(namespace_of(&pid, "uts"), namespace_of(other, "uts"));
    }
    let entered = Command::new("nsenter").args(["--uts", "-t", &pid, "hostname"]).output();
    assert_eq!(String::from_utf8_lossy(&entered.expect("nsenter").stdout), "inside\n");

    succeeds(&stage, &["start", "test"]);
    let pid_file = stage.path().join("exec.pid");
    let mut exec = stage.kiln();
    exec.args(["exec", "--detach", "--pid-file"]).arg(&pid_file).args(["test", "sleep", "1000"]);
    exec.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(exec.status().expect("kiln").success());
    let proxy = fs::read_to_string(pid_file).expect("pid file");
    for kind in ["net", "ipc", "uts", "cgroup"] {
        assert_eq!(namespace_of(&proxy, kind), namespace_of(&pid, kind), "{kind}");
    }
    let cgroup_of = |pid: &str| fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("cgroup");
    assert_eq!(cgroup_of(&proxy), cgroup_of(&pid));
    succeeds(&stage, &["delete", "--force", "test"]);
}

#[test]
fn new_network_namespace_can_be_filled_before_the_start() {
    let stage = Stage::new(&["true"]);
    set_namespaces(&stage, json!([{"type": "pid"}, {"type": "mount"}, {"type": "network"}]));
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let pid = stage.state()["pid"].to_string();
    assert_ne!(namespace_of(&pid, "net"), namespace_of("self", "net"));
    for kind in ["ipc", "uts"] {
        assert_eq!(namespace_of(&pid, kind), namespace_of("self", kind), "{kind}");
    }
    let ip = |args: &[&str]| {
        let mut nsenter = Command::new("nsenter");
        let output = nsenter.args(["--net", "-t", &pid, "ip"]).args(args).output().expect("ip");
        assert!(output.status.success(), "{}", errors(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    ip(&["link", "add", "late", "type", "veth", "peer", "name", "peer"]);
    assert!(ip(&["link"]).contains("late"));
    succeeds(&stage, &["start", "test"]);
    succeeds(&stage, &["delete", "--force", "test"]);
}

#[test]
fn path_that_is_no_namespace_is_refused_by_field() {
    let stage = Stage::new(&["true"]);
    for (path, word) in [("/dev/null", "not a namespace"), ("/proc/self/ns/uts", "another type")] {
        set_namespaces(&stage, json!([{"type": "pid"}, {"type": "network", "path": path}]));
        let output = create(&stage, &[]);
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        assert!(errors.contains("linux.namespaces[1].path") && errors.contains(word), "{errors}");
        assert!(stage.is_clean());
    }
}

#[test]
fn host_name_of_a_joined_namespace_is_the_containers() {
    let holder = Holder::new();
    let name = |words: &[&str]| {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--uts", "-t", &holder.0.id().to_string(), "hostname"]).args(words);
        assert!(nsenter.status().expect("nsenter").success());
    };
    name(&["of-the-pod"]);
    let stage = Stage::new(&["cat", "/proc/sys/kernel/hostname"]);
    set_namespaces(
        &stage,
        json!([{"type": "pid"}, {"type": "mount"}, {"type": "uts", "path": holder.path("uts")}]),
    );
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "of-the-pod\n", "{}", errors(&output));
}

#[test]
fn log_says_that_the_hosts_network_is_not_there() {
    let stage = Stage::new(&["true"]);
    let log = stage.path().join("log");
    for (namespaces, is_said) in [
        (json!([{"type": "pid"}, {"type": "mount"}]), true),
        (json!([{"type": "pid"}, {"type": "mount"}, {"type": "network"}]), false),
    ] {
        set_namespaces(&stage, namespaces);
        let _ = fs::remove_file(&log);
        let mut run = stage.kiln();
        run.arg("--log").arg(&log).args(["run", "--engine", "emulated", "--bundle"]);
        let output = run.arg(stage.bundle()).arg("test").stdin(Stdio::null()).output();
        assert!(output.expect("kiln").status.success());
        let log = fs::read_to_string(&log).unwrap_or_default();
        assert_eq!(log.contains("no network namespace"), is_said, "{log}");
    }
}
