//! A folder with a bundle and a state directory, and kiln called on them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

/// How long anything that should happen at once may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A folder of one test's own.
pub struct Stage {
    dir: tempfile::TempDir,
}

impl Stage {
    /// A bundle that runs `args` on a root file system with busybox.
    pub fn new(args: &[&str]) -> Self {
        let stage = Self { dir: tempfile::tempdir().expect("temporary directory") };
        let rootfs = stage.rootfs();
        for directory in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir_all(rootfs.join(directory)).expect("directory");
        }
        let busybox = Path::new("/bin/busybox");
        if busybox.exists() {
            fs::copy(busybox, rootfs.join("bin/busybox")).expect("busybox");
            for applet in [
                "sh", "true", "cat", "yes", "sleep", "stty", "dd", "head", "id", "ls", "mkdir",
                "rm",
            ] {
                std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet))
                    .expect("link");
            }
        }
        stage.write_config(&config(args));
        stage
    }

    /// The test's folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where kiln keeps state.
    pub fn root(&self) -> PathBuf {
        self.path().join("state")
    }

    /// The bundle.
    pub fn bundle(&self) -> PathBuf {
        self.path().join("bundle")
    }

    /// The bundle's root file system.
    pub fn rootfs(&self) -> PathBuf {
        self.bundle().join("rootfs")
    }

    /// Replaces the bundle's config.json.
    pub fn write_config(&self, config: &Value) {
        self.write_config_text(&config.to_string());
    }

    /// Replaces the bundle's config.json with what may be no JSON.
    pub fn write_config_text(&self, text: &str) {
        fs::write(self.bundle().join("config.json"), text).expect("config.json");
    }

    /// Changes the bundle's config.json.
    pub fn edit(&self, change: impl FnOnce(&mut Value)) {
        let text = fs::read(self.bundle().join("config.json")).expect("config.json");
        let mut config = serde_json::from_slice(&text).expect("JSON");
        change(&mut config);
        self.write_config(&config);
    }

    /// `kiln` with this state directory, before any verb.
    pub fn kiln(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command.arg("--root").arg(self.root());
        // The mark by which a test finds its own processes.
        command.env("KILN_LIB_DIR", lib_dir()).env("KILN_TEST", self.root());
        command
    }

    /// `kiln run` of the bundle under the emulated engine.
    pub fn run(&self, options: &[&str]) -> Command {
        let mut command = self.kiln();
        command.args(["run", "--engine", "emulated", "--bundle"]).arg(self.bundle());
        command.args(options).arg("test");
        command
    }

    /// What `kiln state` says of the container `test`.
    pub fn state(&self) -> Value {
        let output = self.kiln().args(["state", "test"]).output().expect("kiln");
        assert!(output.status.success(), "{}", errors(&output));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// Whether nothing of a sandbox is left in the state directory.
    pub fn is_clean(&self) -> bool {
        fs::read_dir(self.root()).map_or(true, |mut entries| entries.next().is_none())
    }
}

/// A test that has failed leaves nothing behind that runs, either.
impl Drop for Stage {
    fn drop(&mut self) {
        for entry in fs::read_dir(self.root()).into_iter().flatten().flatten() {
            let mut delete = self.kiln();
            delete.args(["delete", "--force"]).arg(entry.file_name());
            // What it can't delete is killed.
            let _ = delete.stdin(Stdio::null()).stderr(Stdio::null()).status();
        }
        for pid in processes_of(self) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// `kiln create` of the bundle as `test`. The container keeps the standard streams, so they are
/// files of the stage.
pub fn create(stage: &Stage, options: &[&str]) -> Output {
    let file = |name| fs::File::create(stage.path().join(name)).expect("file");
    let mut command = stage.kiln();
    command.args(["create", "--engine", "emulated", "--bundle"]).arg(stage.bundle());
    command.args(options).arg("test");
    command.stdin(Stdio::null()).stdout(file("output")).stderr(file("errors"));
    let status = command.status().expect("kiln");
    let stderr = fs::read(stage.path().join("errors")).expect("errors");
    Output { status, stdout: Vec::new(), stderr }
}

/// What kiln says to these arguments.
pub fn kiln(stage: &Stage, args: &[&str]) -> Output {
    stage.kiln().args(args).output().expect("kiln")
}

/// What a command that succeeds wrote.
pub fn succeeds(stage: &Stage, args: &[&str]) -> String {
    let output = kiln(stage, args);
    assert!(output.status.success(), "{args:?}: {}", errors(&output));
    String::from_utf8(output.stdout).expect("text")
}

/// Waits until the container `test` has this status.
pub fn wait_for(stage: &Stage, status: &str) {
    eventually(status, || stage.state()["status"] == status);
}

/// Waits until the container `test` has written this.
pub fn wait_for_output(stage: &Stage, text: &str) {
    let path = stage.path().join("output");
    eventually(text, || fs::read_to_string(&path).expect("output").contains(text));
}

/// Where the guest's kernel and agent are.
pub fn lib_dir() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("out/lib/kiln");
    std::env::var_os("KILN_LIB_DIR").map_or_else(built, PathBuf::from)
}

/// A configuration that runs `args` without a terminal.
pub fn config(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin"],
            "cwd": "/",
        },
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "mode=755"]},
        ],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}]},
    })
}

/// What a command wrote to standard error.
pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Waits until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The pids of processes whose command line or environment mentions a path, but this one.
pub fn processes_of(stage: &Stage) -> Vec<i32> {
    let mark = stage.root().to_string_lossy().into_owned().into_bytes();
    let mentions = |text: Vec<u8>| text.windows(mark.len()).any(|part| part == mark);
    let own = i32::try_from(std::process::id()).expect("a pid");
    fs::read_dir("/proc")
        .expect("/proc")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| fs::read(format!("/proc/{pid}/environ")).is_ok_and(mentions))
        .collect()
}
