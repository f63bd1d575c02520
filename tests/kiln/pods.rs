//! Pods, as containerd's CRI plugin and CRI-O drive them: a sandbox, and containers that name it and
//! its namespaces.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::lifecycle::{create, succeeds, wait_for};
use crate::stage::{Stage, config, errors, eventually};

/// A pod whose sandbox is the container `test` of a stage, and runs.
struct Pod {
    stage: Stage,
    pid: String,
}

impl Pod {
    fn new() -> Self {
        let stage = Stage::new(&["sleep", "1000"]);
        for applet in ["echo", "mkfifo", "nc", "hostname", "kill", "test"] {
            std::os::unix::fs::symlink("busybox", stage.rootfs().join("bin").join(applet))
                .expect("link");
        }
        stage.edit(|config| {
            config["annotations"] = json!({
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "test",
                "io.kubernetes.cri.sandbox-memory": "268435456",
            });
            config["hostname"] = json!("pod");
            config["linux"]["namespaces"] = json!([
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network"},
            ]);
        });
        let output = create(&stage, &[]);
        assert!(output.status.success(), "{}", errors(&output));
        succeeds(&stage, &["start", "test"]);
        let pid = stage.state()["pid"].to_string();
        Self { stage, pid }
    }

    /// What a container of the pod that runs `script` is configured with.
    fn config(&self, script: &str) -> Value {
        let mut config = config(&["sh", "-c", script]);
        let path = |kind: &str| format!("/proc/{}/ns/{kind}", self.pid);
        config["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "test",
        });
        config["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "ipc", "path": path("ipc")},
            {"type": "uts", "path": path("uts")},
            {"type": "network", "path": path("net")},
        ]);
        let source = self.volume();
        fs::create_dir_all(&source).expect("directory");
        config["mounts"].as_array_mut().expect("mounts").push(json!({
            "destination": "/volume", "type": "bind", "source": source, "options": ["rbind", "rw"],
        }));
        config
    }

    fn volume(&self) -> PathBuf {
        self.stage.path().join("volume")
    }

    fn folder(&self, id: &str) -> PathBuf {
        self.stage.path().join(id)
    }

    /// `kiln create` of a container of the pod. Its outputs are files.
    fn create(&self, id: &str, config: &Value, options: &[&str]) -> Output {
        let folder = self.folder(id);
        if !folder.exists() {
            fs::create_dir_all(folder.join("rootfs")).expect("directory");
            for directory in ["proc", "dev", "tmp", "bin"] {
                fs::create_dir(folder.join("rootfs").join(directory)).expect("directory");
            }
            copy_programs(&self.stage.rootfs(), &folder.join("rootfs"));
        }
        fs::write(folder.join("config.json"), config.to_string()).expect("config.json");
        let file = |name: &str| File::create(folder.join(name)).expect("file");
        let mut command = self.stage.kiln();
        command.args(["create", "--bundle"]).arg(&folder).args(options).arg(id);
        command.stdin(Stdio::null()).stdout(file("output")).stderr(file("errors"));
        let status = command.status().expect("kiln");
        let stderr = fs::read(folder.join("errors")).expect("errors");
        Output { status, stdout: Vec::new(), stderr }
    }

    /// Creates and starts a container; gives the process that stands for it.
    fn run(&self, id: &str, script: &str) -> i32 {
        let output = self.create(id, &self.config(script), &[]);
        assert!(output.status.success(), "{id}: {}", errors(&output));
        succeeds(&self.stage, &["start", id]);
        i32::try_from(self.state(id)["pid"].as_i64().expect("a number")).expect("a pid")
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&succeeds(&self.stage, &["state", id])).expect("JSON")
    }

    fn wait_for(&self, id: &str, status: &str) {
        eventually(&format!("{id} is {status}"), || self.state(id)["status"] == status);
    }

    fn output(&self, id: &str) -> String {
        let folder = self.folder(id);
        let read = |name: &str| fs::read_to_string(folder.join(name)).expect("output");
        read("output") + &read("errors")
    }

    /// What of later containers is mounted in the sandbox's share.
    fn additions(&self) -> Vec<String> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid));
        let children = children.expect("processes of the sandbox");
        let is_fs = |pid: &&str| {
            fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "kiln-fs\n")
        };
        let server = children.split_whitespace().find(is_fs).expect("its file system process");
        let mounts = fs::read_to_string(format!("/proc/{server}/mountinfo")).expect("its mounts");
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let later =
            |point: &&str| point.starts_with("/containers/") || point.starts_with("/volumes/");
        points.filter(later).map(str::to_owned).collect()
    }

    fn end(self) {
        succeeds(&self.stage, &["delete", "--force", "test"]);
        assert!(self.stage.is_clean());
    }
}

fn copy_programs(from: &Path, to: &Path) {
    fs::copy(from.join("bin/busybox"), to.join("bin/busybox")).expect("busybox");
    for entry in fs::read_dir(from.join("bin")).expect("programs") {
        let name = entry.expect("entry").file_name();
        if name != "busybox" {
            std::os::unix::fs::symlink("busybox", to.join("bin").join(name)).expect("link");
        }
    }
}

/// Waits for the end of a process that was left to this one; gives its status.
fn status_of(pid: i32) -> i32 {
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    libc::WEXITSTATUS(status)
}

fn adopt_orphans() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
}

#[test]
fn containers_of_a_pod_share_its_network_its_name_and_its_volumes() {
    adopt_orphans();
    let pod = Pod::new();
    // What is more than bytes in a volume works between containers of one machine.
    let server = pod.run(
        "server",
        "mkfifo /volume/pipe; nc -ll -p 5000 -e cat & read line < /volume/pipe; echo $line; exit 21",
    );
    eventually("the pipe", || pod.volume().join("pipe").exists());
    let client = pod.run(
        "client",
        "hostname; until echo over | nc 127.0.0.1 5000; do sleep 0.1; done
         echo through > /volume/pipe; test -e /volume/none; echo $?; exit 20",
    );
    assert_eq!(status_of(client), 20, "{}", pod.output("client"));
    assert_eq!(pod.output("client"), "pod\nover\n1\n");
    assert_eq!(status_of(server), 21, "{}", pod.output("server"));
    assert_eq!(pod.output("server"), "through\n");
    for id in ["client", "server"] {
        assert_eq!(pod.state(id)["status"], "stopped");
        succeeds(&pod.stage, &["delete", id]);
    }
    assert_eq!(pod.stage.state()["status"], "running");
    eventually("nothing of them in the share", || pod.additions().is_empty());
    pod.end();
}

#[test]
fn container_of_a_pod_has_all_verbs() {
    adopt_orphans();
    let pod = Pod::new();
    let script = "trap 'echo term; exit 5' TERM; echo up; while :; do sleep 0.1; done";
    let pid = pod.run("second", script);
    eventually("its output", || pod.output("second") == "up\n");
    for kind in ["net", "ipc", "uts"] {
        let of = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace");
        assert_eq!(of(&pid.to_string()), of(&pod.pid), "{kind}");
    }
    let exec = pod.stage.kiln().args(["exec", "second", "sh", "-c", "hostname; exit 9"]).output();
    let exec = exec.expect("kiln");
    assert_eq!((exec.status.code(), exec.stdout.as_slice()), (Some(9), &b"pod\n"[..]));
    let table = succeeds(&pod.stage, &["ps", "second"]);
    assert!(table.contains("sleep 0.1") && !table.contains("sleep 1000"), "{table}");
    let listed: Vec<i32> =
        serde_json::from_str(&succeeds(&pod.stage, &["ps", "--format", "json", "second"]))
            .expect("JSON");
    assert_eq!(listed, [pid]);

    succeeds(&pod.stage, &["pause", "second"]);
    assert_eq!(pod.state("second")["status"], "paused");
    assert_eq!(pod.stage.state()["status"], "running");
    succeeds(&pod.stage, &["resume", "second"]);
    succeeds(&pod.stage, &["update", "--pids-limit", "77", "second"]);
    let events = succeeds(&pod.stage, &["events", "--stats", "second"]);
    let events: Value = serde_json::from_str(&events).expect("JSON");
    assert_eq!(events["data"]["pids"]["limit"], 77, "{events}");

    succeeds(&pod.stage, &["kill", "second", "TERM"]);
    assert_eq!(status_of(pid), 5);
    assert_eq!(pod.output("second"), "up\nterm\n");
    succeeds(&pod.stage, &["delete", "second"]);
    pod.end();
}

#[test]
fn death_of_a_containers_process_is_its_own_end_only() {
    adopt_orphans();
    let pod = Pod::new();
    let pid = pod.run("second", "exec sleep 1000");
    let other = pod.run("third", "exec sleep 1000");
    assert!(!pod.additions().is_empty());
    // SAFETY: plain numbers.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGKILL) }, 0);
    status_of(pid);
    pod.wait_for("second", "stopped");
    eventually("its root file system leaves the share", || {
        pod.additions().iter().filter(|path| path.starts_with("/containers/")).count() == 1
    });
    succeeds(&pod.stage, &["delete", "second"]);
    // The name is free again.
    let again = pod.run("second", "exit 3");
    assert_eq!(status_of(again), 3, "{}", pod.output("second"));

    // The end of the sandbox is the end of all.
    succeeds(&pod.stage, &["delete", "--force", "test"]);
    assert_eq!(status_of(other), 128 + 9);
    pod.wait_for("third", "stopped");
    for id in ["second", "third"] {
        succeeds(&pod.stage, &["delete", id]);
    }
    assert!(pod.stage.is_clean());
}

#[test]
fn what_is_left_in_the_guest_of_a_container_that_has_ended_holds_no_files() {
    adopt_orphans();
    let pod = Pod::new();
    let pid =
        pod.run("second", "ls -lR / > /dev/null 2>&1; cat /bin/busybox > /volume/copy; exit 4");
    assert_eq!(status_of(pid), 4);
    let open_files = || {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", pod.pid));
        let folder = pod.folder("second").join("rootfs").display().to_string();
        let children = children.expect("processes of the sandbox");
        let of = |pid: &str| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
        children
            .split_whitespace()
            .flat_map(of)
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| path.to_string_lossy().contains(&folder))
            .count()
    };
    eventually("no file of it is open", || open_files() == 0);
    succeeds(&pod.stage, &["delete", "second"]);
    pod.end();
}

#[test]
fn what_no_pod_can_have_is_refused_by_name() {
    let pod = Pod::new();
    let refused = |config: &Value, options: &[&str], words: &[&str]| {
        let output = pod.create("refused", config, options);
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        for word in words {
            assert!(errors.contains(word), "{word:?} is missing in: {errors}");
        }
    };
    let mut config = pod.config("true");
    config["annotations"]["io.kubernetes.cri.sandbox-id"] = json!("nobody");
    let named = "annotations[\"io.kubernetes.cri.sandbox-id\"]";
    refused(&config, &[], &[named, "\"nobody\"", "does not exist", "io.kiln.machine=container"]);

    let mut config = pod.config("true");
    config["linux"]["namespaces"][2]["path"] = json!("/proc/self/ns/ipc");
    refused(&config, &[], &["ipc namespace is not that of the pod's sandbox test"]);

    let mut config = pod.config("true");
    config["linux"]["namespaces"][0]["path"] = json!("/proc/self/ns/pid");
    refused(&config, &[], &["linux.namespaces[0].path", "no container of the pod"]);
    config["linux"]["namespaces"][0]["path"] =
        json!(format!("/proc/{}/ns/pid", std::process::id()));
    refused(&config, &[], &["linux.namespaces", "no container of kiln's runs"]);

    let config = pod.config("true");
    refused(&config, &["--memory", "512"], &["--memory", "pod's sandbox test"]);
    refused(&config, &["--engine", "kvm"], &["--engine", "pod's sandbox test"]);

    // A container of the pod is no sandbox.
    let output = pod.create("second", &config, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let mut config = pod.config("true");
    config["annotations"]["io.kubernetes.cri.sandbox-id"] = json!("second");
    refused(&config, &[], &["container second is in a pod's machine itself"]);
    succeeds(&pod.stage, &["delete", "--force", "second"]);

    succeeds(&pod.stage, &["kill", "test", "KILL"]);
    wait_for(&pod.stage, "stopped");
    let mut config = pod.config("true");
    config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}]);
    refused(&config, &[], &["the pod's sandbox test has stopped"]);
    pod.end();
}

#[test]
fn program_that_is_not_found_fails_the_create_and_leaves_the_pod_as_it_was() {
    let pod = Pod::new();
    let mut config = pod.config("");
    config["process"]["args"] = json!(["nosuchprogram"]);
    let output = pod.create("second", &config, &[]);
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("executable file not found in $PATH"), "{errors}");
    assert_eq!(succeeds(&pod.stage, &["list", "--quiet"]), "test\n");
    eventually("nothing of it in the share", || pod.additions().is_empty());
    pod.end();
}
