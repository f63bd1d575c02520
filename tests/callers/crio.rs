//! The calls of CRI-O, one by one: a conmon for each container of a pod and for each exec that is waited
//! for, and the runtime's own verbs beside it. conmon is the distribution's; CRI-O is in none of Debian's
//! releases.
//!
//! The runtime, its root and the annotations are those of the file that users are told to write.

use std::fs;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::image::fill_rootfs;
use crate::stage::{Stage, documented, eventually, on_stage};

const SANDBOX: &str = "6f0a3c5d9b7e41f28a6d0c4be193758264ad0b9ce1f3752868b4d09a7c5e1f32";
const CONTAINER: &str = "b2d94e7a10c6f3855e9b7d24a8c1f06e3b5d92c7e4a0186fd3b9572ec8a4160d";

const NAMESPACES: [&str; 3] = ["/run/netns/pod", "/run/ipcns/pod", "/run/utsns/pod"];

/// CRI-O's part: what it keeps of a runtime, and where it keeps what.
struct Crio<'a> {
    stage: &'a Stage,
    runtime: String,
    root: String,
}

impl<'a> Crio<'a> {
    /// With the namespaces of a pod, which are there before its first container.
    fn new(stage: &'a Stage) -> Self {
        let text = documented("/etc/crio/crio.conf.d/10-kiln.conf");
        let file: toml::Table = toml::from_str(text).expect("TOML");
        let handler = &file["crio"]["runtime"]["runtimes"]["kiln"];
        assert_eq!(handler["runtime_type"].as_str(), Some("oci"));
        let field = |name: &str| handler[name].as_str().expect("a path").to_owned();
        for directory in ["exits", "attach"] {
            fs::create_dir_all(stage.path(directory)).expect("directory");
        }
        for path in &NAMESPACES[1..] {
            let path = std::path::Path::new(path);
            fs::create_dir_all(path.parent().expect("a folder")).expect("directory");
            fs::write(path, "").expect("file");
        }
        stage.ok(&["ip", "netns", "add", "pod"]);
        stage.ok(&["unshare", "--ipc=/run/ipcns/pod", "--uts=/run/utsns/pod", "hostname", "pod"]);
        Self { stage, runtime: field("runtime_path"), root: field("runtime_root") }
    }

    fn bundle(&self, id: &str) -> PathBuf {
        self.stage.path(&format!("bundles/{id}"))
    }

    /// Runs conmon with the pipes that it is given, in the words of a shell; gives what it reports.
    fn conmon(&self, report: &str, args: &[&str]) -> PathBuf {
        let report = self.stage.path(report);
        let attach = self.stage.path("attach");
        let script = format!(
            "_OCI_SYNCPIPE=3 _OCI_STARTPIPE=4 exec conmon -r {} --runtime-arg --root={} \
             --socket-dir-path {} --log-level info \"$@\" 3>{} 4</dev/zero",
            self.runtime,
            self.root,
            attach.display(),
            report.display(),
        );
        // After an exec it exits with that one's status: what counts is the report.
        self.stage.run(&[&["sh", "-c", &script, "sh"], args].concat());
        report
    }

    /// Creates a container of the pod; gives the process that stands for it.
    fn create(&self, id: &str, kind: &str, script: &str) -> i64 {
        let bundle = self.bundle(id);
        fs::create_dir_all(&bundle).expect("directory");
        fill_rootfs(&bundle.join("rootfs"));
        fs::write(bundle.join("config.json"), config(id, kind, script).to_string()).expect("file");
        let of_bundle = |name: &str| bundle.join(name).display().to_string();
        let (folder, exits) = (bundle.display().to_string(), self.stage.path("exits"));
        let (exits, log) = (exits.display().to_string(), of_bundle("log"));
        let (own, pid) = (of_bundle("conmon-pidfile"), of_bundle("pidfile"));
        let report = self.conmon(
            &format!("report-{kind}"),
            &[
                "-b",
                &folder,
                "-c",
                id,
                "--exit-dir",
                &exits,
                "-l",
                &log,
                "-n",
                kind,
                "-P",
                &own,
                "-p",
                &pid,
                "--persist-dir",
                &folder,
                "--syslog",
                "-u",
                id,
            ],
        );
        let mut found = None;
        eventually("conmon's report", || {
            let text = fs::read_to_string(&report).expect("report");
            found = serde_json::from_str::<Value>(&text).ok();
            found.is_some()
        });
        let found = found.expect("a report");
        let reported = found["pid"].as_i64().filter(|pid| *pid > 0);
        let reported = reported.unwrap_or_else(|| panic!("not created: {found}"));
        assert_eq!(fs::read_to_string(&pid).expect("pid file"), reported.to_string());
        reported
    }

    /// The runtime's own verb.
    fn runtime(&self, args: &[&str]) -> String {
        self.stage.ok(&[&[self.runtime.as_str(), "--root", &self.root], args].concat())
    }

    fn state(&self, id: &str) -> Value {
        serde_json::from_str(&self.runtime(&["state", id])).expect("JSON")
    }

    fn process(&self, script: &str) -> String {
        let process = self.stage.path("process.json");
        fs::write(&process, config(CONTAINER, "container", script)["process"].to_string())
            .expect("file");
        process.display().to_string()
    }

    /// Executes a script in the container and waits for it, for so many seconds: what conmon reports, and
    /// what it logged.
    fn exec_sync(&self, seconds: &str, script: &str) -> (Value, String) {
        let (process, log) = (self.process(script), self.stage.path("exec.log"));
        let pid = self.stage.path("exec.pid").display().to_string();
        let _ = fs::remove_file(&log);
        let logged = log.display().to_string();
        let args = [
            "-c",
            CONTAINER,
            "-n",
            "container",
            "-p",
            &pid,
            "-e",
            "-l",
            &logged,
            "--sync",
            "-T",
            seconds,
            "--exec-process-spec",
            &process,
        ];
        let report = self.conmon("report-exec", &args);
        let report = fs::read_to_string(report).expect("report");
        let report = serde_json::from_str(&report).unwrap_or_else(|_| panic!("report: {report}"));
        (report, fs::read_to_string(log).unwrap_or_default())
    }

    /// The status that conmon has written down.
    fn exit_status(&self, id: &str) -> String {
        let file = self.stage.path("exits").join(id);
        eventually("the exit file", || file.exists());
        fs::read_to_string(file).expect("file")
    }
}

fn config(id: &str, kind: &str, script: &str) -> Value {
    let [network, ipc, uts] = NAMESPACES;
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": ["sh", "-c", script],
            "env": ["PATH=/usr/bin:/bin", "TERM=xterm", "HOSTNAME=pod"],
            "cwd": "/",
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            "oomScoreAdj": 1000,
        },
        "root": {"path": "rootfs"},
        "hostname": "pod",
        "annotations": {
            "io.kubernetes.cri-o.ContainerType": kind,
            "io.kubernetes.cri-o.SandboxID": SANDBOX,
            "io.kubernetes.cri-o.ContainerID": id,
            "io.kubernetes.cri-o.RuntimeHandler": "kiln",
            "io.kubernetes.cri-o.TTY": "false",
            "io.container.manager": "cri-o",
        },
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
            {"destination": "/etc/hostname", "type": "bind", "source": "/etc/hostname",
             "options": ["ro", "bind", "nodev", "nosuid", "noexec"]},
        ],
        "linux": {
            "resources": {
                "devices": [{"allow": false, "access": "rwm"}],
                "memory": {"limit": 256 << 20},
                "pids": {"limit": 100},
            },
            "cgroupsPath": format!("/kiln-pods/crio-{id}"),
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "network", "path": network},
                {"type": "ipc", "path": ipc}, {"type": "uts", "path": uts},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
        },
    })
}

#[test]
fn pod_is_made_used_and_removed_by_conmon_and_the_verbs() {
    on_stage(|stage| {
        let crio = Crio::new(stage);
        let infra = crio.create(SANDBOX, "sandbox", "exec sleep 1000");
        assert_eq!(crio.state(SANDBOX)["status"], "created");
        crio.runtime(&["start", SANDBOX]);
        let state = crio.state(SANDBOX);
        assert_eq!((&state["status"], &state["pid"]), (&json!("running"), &json!(infra)));
        assert_eq!(state["annotations"]["io.kubernetes.cri-o.ContainerType"], "sandbox");

        let script = "trap 'exit 5' TERM; echo out; echo err >&2; while :; do sleep 0.1; done";
        crio.create(CONTAINER, "container", script);
        crio.runtime(&["start", CONTAINER]);
        let log = crio.bundle(CONTAINER).join("log");
        let logged = |line: &str| {
            let log = fs::read_to_string(&log).unwrap_or_default();
            log.lines().any(|logged| logged.ends_with(line))
        };
        eventually("log", || logged(" stdout F out") && logged(" stderr F err"));

        let (report, log) = crio.exec_sync("60", "hostname; echo no >&2; exit 7");
        assert_eq!(report["exit_code"], 7, "{report}");
        let lines: Vec<_> = log.lines().filter_map(|line| line.split_once(' ')).collect();
        let lines: Vec<_> = lines.into_iter().map(|(_time, line)| line).collect();
        assert!(lines.contains(&"stdout F pod") && lines.contains(&"stderr F no"), "{log}");
        let (report, _) = crio.exec_sync("1", "exec sleep 1000");
        assert_eq!(report["exit_code"], -1, "{report}");
        let streamed = crio.runtime(&["exec", "--process", &crio.process("echo in"), CONTAINER]);
        assert_eq!(streamed, "in\n");

        let resources = stage.path("resources");
        fs::write(&resources, r#"{"memory": {"limit": 134217728}}"#).expect("file");
        let update = format!(
            "{} --root {} update --resources - {CONTAINER} <{}",
            crio.runtime,
            crio.root,
            resources.display()
        );
        stage.ok(&["sh", "-c", &update]);
        let limit = crio.process("cat /sys/fs/cgroup/memory.max");
        assert_eq!(crio.runtime(&["exec", "--process", &limit, CONTAINER]), "134217728\n");
        crio.runtime(&["pause", CONTAINER]);
        assert_eq!(crio.state(CONTAINER)["status"], "paused");
        crio.runtime(&["resume", CONTAINER]);

        crio.runtime(&["kill", CONTAINER, "TERM"]);
        assert_eq!(crio.exit_status(CONTAINER), "5");
        eventually("the end", || crio.state(CONTAINER)["status"] == "stopped");
        crio.runtime(&["delete", "--force", CONTAINER]);
        crio.runtime(&["kill", SANDBOX, "KILL"]);
        assert_eq!(crio.exit_status(SANDBOX), "137");
        crio.runtime(&["delete", "--force", SANDBOX]);
        crio.runtime(&["delete", "--force", SANDBOX]);
        assert_eq!(crio.runtime(&["list", "--quiet"]), "");
    });
}

#[test]
fn container_that_cannot_be_made_is_told_to_conmon() {
    on_stage(|stage| {
        let crio = Crio::new(stage);
        let bundle = crio.bundle(CONTAINER);
        fs::create_dir_all(&bundle).expect("directory");
        fill_rootfs(&bundle.join("rootfs"));
        // Its sandbox isn't there.
        let text = config(CONTAINER, "container", "true").to_string();
        fs::write(bundle.join("config.json"), text).expect("file");
        let [folder, log, pid] =
            ["", "log", "pid"].map(|name| bundle.join(name).display().to_string());
        let args =
            ["-b", &folder, "-c", CONTAINER, "-l", &log, "-n", "c", "-p", &pid, "-u", CONTAINER];
        let report = crio.conmon("report", &args);
        eventually("conmon's report", || {
            fs::read_to_string(&report).is_ok_and(|text| text.ends_with('\n'))
        });
        let report: Value =
            serde_json::from_str(&fs::read_to_string(report).expect("report")).expect("JSON");
        assert_eq!(report["pid"], -1, "{report}");
        let message = report["message"].as_str().expect("a message");
        assert!(message.contains("io.kubernetes.cri-o.SandboxID"), "{message}");
    });
}
