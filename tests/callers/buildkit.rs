//! The calls of BuildKit's executor, one by one: `run --keep` in the foreground, `exec` beside it,
//! signals to either process, `kill` and `delete`.
//!
//! The executor gives no `--root`, has the runtime in a process group of its own, and has the kernel
//! kill it when the thread that started it ends.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::pty::{OpenptyResult, Winsize, openpty};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::image::fill_rootfs;
use crate::stage::{Stage, eventually, on_stage};

const ID: &str = "k8s1wz0p3v7xq5n2m4c6b8d9f";

/// A bundle as the executor writes it.
struct Step<'a> {
    stage: &'a Stage,
    terminal: bool,
}

impl<'a> Step<'a> {
    fn new(stage: &'a Stage, args: &[&str]) -> Self {
        let step = Self { stage, terminal: false };
        fs::create_dir_all(step.bundle()).expect("directory");
        fill_rootfs(&step.bundle().join("rootfs"));
        step.write("config.json", &config(args));
        step
    }

    fn on_terminal(mut self, args: &[&str]) -> Self {
        let mut config = config(args);
        config["process"]["terminal"] = json!(true);
        self.write("config.json", &config);
        self.terminal = true;
        self
    }

    fn bundle(&self) -> std::path::PathBuf {
        self.stage.path("bundle")
    }

    fn write(&self, name: &str, content: &Value) {
        fs::write(self.bundle().join(name), content.to_string()).expect("file");
    }

    /// A file of the step's root file system.
    fn file(&self, name: &str) -> std::path::PathBuf {
        self.bundle().join("rootfs").join(name)
    }

    fn log(&self) -> std::path::PathBuf {
        self.bundle().join("runc-log.json")
    }

    fn kiln(&self, args: &[&str]) -> Command {
        let mut command = Command::new("kiln");
        command.arg("--log").arg(self.log()).args(["--log-format", "json"]).args(args);
        let dies_with_thread = || {
            // SAFETY: plain numbers.
            match unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) } {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        };
        // SAFETY: only a system call.
        unsafe { command.process_group(0).pre_exec(dies_with_thread) };
        command
    }

    fn run(&self) -> Command {
        let bundle = self.bundle().display().to_string();
        self.kiln(&["run", "--bundle", &bundle, "--keep", ID])
    }

    /// Starts the step with its output in a file; returns when it has made the file `up`.
    fn start(&self) -> Child {
        let output = || fs::File::create(self.stage.path("output")).expect("file");
        let mut command = self.run();
        let mut child =
            command.stdin(Stdio::null()).stdout(output()).stderr(output()).spawn().expect("kiln");
        eventually("the step", || {
            assert!(child.try_wait().expect("child").is_none(), "{}", self.said());
            self.file("up").exists()
        });
        child
    }

    fn said(&self) -> String {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        format!("{}\n{}", read(&self.stage.path("output")), read(&self.log()))
    }

    /// `exec` of a process beside the step, with the process id's file.
    fn exec(&self, args: &[&str]) -> Command {
        self.write("process.json", &config(args)["process"]);
        let of_bundle = |name: &str| self.bundle().join(name).display().to_string();
        let (process, pid) = (of_bundle("process.json"), of_bundle("pid"));
        self.kiln(&["exec", "--process", &process, "--pid-file", &pid, ID])
    }

    /// What the executor does at last, whatever happened before.
    fn end(&self) {
        let _ = self.kiln(&["kill", ID, "9"]).output().expect("kiln");
        eventually("the deletion", || {
            self.kiln(&["delete", ID]).output().expect("kiln").status.success()
        });
        assert_eq!(self.stage.containers(), 0);
    }
}

fn config(args: &[&str]) -> Value {
    let capabilities = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SYS_CHROOT",
    ];
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "user": {"uid": 0, "gid": 0, "additionalGids": [0]},
            "args": args,
            "env": ["PATH=/usr/bin:/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities, "effective": capabilities, "permitted": capabilities,
            },
            "noNewPrivileges": false,
        },
        "root": {"path": "rootfs"},
        "hostname": "buildkitsandbox",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts",
             "options": ["nosuid", "nodev", "rbind", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "cgroupsPath": format!("/buildkit/{ID}"),
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"},
            ],
            "maskedPaths": ["/proc/acpi", "/proc/kcore", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
        },
    })
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(i32::try_from(child.id()).expect("pid"));
    kill(pid, signal).expect("it is there");
}

#[test]
fn step_ends_with_its_status_and_its_files_are_there() {
    on_stage(|stage| {
        let step = Step::new(stage, &["sh", "-c", "echo out; echo x > /made; exit 42"]);
        let output = step.run().stdin(Stdio::null()).output().expect("kiln");
        assert_eq!(output.status.code(), Some(42), "{}", step.said());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
        assert_eq!(fs::read_to_string(step.file("made")).expect("file"), "x\n");
        step.end();
    });
}

#[test]
fn signals_to_the_run_are_the_steps() {
    on_stage(|stage| {
        let script = "trap 'exit 5' TERM; touch /up; while :; do sleep 0.1; done";
        let step = Step::new(stage, &["sh", "-c", script]);
        let mut run = step.start();
        signal(&run, Signal::SIGTERM);
        assert_eq!(run.wait().expect("child").code(), Some(5), "{}", step.said());
        step.end();
    });
}

#[test]
fn step_that_is_cancelled_is_killed_by_its_id() {
    on_stage(|stage| {
        let step = Step::new(stage, &["sh", "-c", "touch /up; exec sleep 1000"]);
        let mut run = step.start();
        let output = step.kiln(&["kill", ID, "9"]).output().expect("kiln");
        assert!(output.status.success(), "{}", step.said());
        assert_eq!(run.wait().expect("child").code(), Some(137), "{}", step.said());
        step.end();
    });
}

#[test]
fn executor_that_dies_leaves_a_step_that_is_deleted() {
    on_stage(|stage| {
        let step = Step::new(stage, &["sh", "-c", "touch /up; exec sleep 1000"]);
        let mut run = step.start();
        signal(&run, Signal::SIGKILL);
        assert_eq!(run.wait().expect("child").signal(), Some(9));
        step.end();
    });
}

#[test]
fn terminal_is_inherited_and_resized() {
    on_stage(|stage| {
        let script = "until stty size > /size; do sleep 0.1; done; touch /up; \
                      until stty size | grep -q 90; do sleep 0.1; done; \
                      stty size > /resized; exit 8";
        let step = Step::new(stage, &[]).on_terminal(&["sh", "-c", script]);
        let size =
            |rows, columns| Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let OpenptyResult { master, slave } = openpty(Some(&size(31, 97)), None).expect("terminal");
        let stdio = || Stdio::from(slave.try_clone().expect("descriptor"));
        let mut command = step.run();
        let mut run = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn().expect("kiln");
        eventually("the step", || step.file("up").exists());
        assert_eq!(fs::read_to_string(step.file("size")).expect("file"), "31 97\n");
        resize(&master, &size(40, 90));
        signal(&run, Signal::SIGWINCH);
        assert_eq!(run.wait().expect("child").code(), Some(8), "{}", step.said());
        assert_eq!(fs::read_to_string(step.file("resized")).expect("file"), "40 90\n");
        step.end();
    });
}

nix::ioctl_write_ptr_bad!(set_window_size, libc::TIOCSWINSZ, Winsize);

fn resize(master: &OwnedFd, size: &Winsize) {
    // SAFETY: the kernel reads a winsize.
    unsafe { set_window_size(master.as_fd().as_raw_fd(), size) }.expect("resized");
}

#[test]
fn processes_beside_the_step_end_with_their_status_and_are_killed_by_their_pid() {
    on_stage(|stage| {
        let step = Step::new(stage, &["sh", "-c", "touch /up; exec sleep 1000"]);
        let mut run = step.start();
        let mut command = step.exec(&["sh", "-c", "echo in; exit 9"]);
        let output = command.stdin(Stdio::null()).output().expect("kiln");
        assert_eq!(output.status.code(), Some(9), "{}", step.said());
        assert_eq!(String::from_utf8_lossy(&output.stdout), "in\n");

        let pid_file = step.bundle().join("pid");
        fs::remove_file(&pid_file).expect("the pid file of the first");
        let script = "while :; do date +%s%N > /alive; sleep 0.1; done";
        let mut command = step.exec(&["sh", "-c", script]);
        let mut exec = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("kiln");
        eventually("the process", || step.file("alive").exists() && pid_file.exists());
        let pid = fs::read_to_string(&pid_file).expect("pid").parse().expect("a number");
        kill(Pid::from_raw(pid), Signal::SIGKILL).expect("it is there");
        assert!(!exec.wait().expect("child").success());
        let alive = || fs::metadata(step.file("alive")).expect("file").modified().expect("a time");
        let mut before = None;
        eventually("its end in the guest", || {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let now = Some(alive());
            std::mem::replace(&mut before, now) == now
        });
        assert!(run.try_wait().expect("child").is_none(), "the step goes on");
        step.kiln(&["kill", ID, "9"]).output().expect("kiln");
        run.wait().expect("child");
        step.end();
    });
}
