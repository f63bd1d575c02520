//! Each process of a live sandbox is in the jail that `docs/jail.md` says: what its tables promise is
//! read there and compared with `/proc/PID`.

#[path = "promise.rs"]
mod promise;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use kiln_selftest_guests::IDLE;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::stage::Stage;

/// How long a sandbox may take to be up on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A process as the host sees it.
pub struct Process {
    pub pid: i32,
    name: String,
}

impl Process {
    /// A line of its `/proc/PID/status`.
    pub fn status(&self, field: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).expect("status");
        line(&status, field)
    }

    /// One of its capability sets.
    pub fn capabilities(&self, set: &str) -> u64 {
        u64::from_str_radix(&self.status(set), 16).expect("a mask")
    }

    /// Names in its root directory.
    fn root(&self) -> BTreeSet<String> {
        let root = fs::read_dir(format!("/proc/{}/root/", self.pid)).expect("its root");
        root.map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned()).collect()
    }

    /// What its descriptors refer to.
    fn files(&self) -> Vec<String> {
        let directory = fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("its descriptors");
        let links = directory.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
        links.map(|link| link.to_string_lossy().into_owned()).collect()
    }

    /// One of its resource limits, the soft one.
    pub fn limit(&self, name: &str) -> String {
        let limits = fs::read_to_string(format!("/proc/{}/limits", self.pid)).expect("limits");
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).expect("the limit");
        line.split_whitespace().next().expect("a soft limit").to_owned()
    }

    /// Gives the user that nobody else has.
    pub fn check_identity(&self) -> u32 {
        let ids: Vec<String> = ["Uid", "Gid"].iter().map(|field| self.status(field)).collect();
        let id: u32 = ids[0].split(' ').next().expect("an id").parse().expect("a number");
        assert!(id >= 0x7000_0000, "{} has uid {id}", self.name);
        assert_eq!(ids, [format!("{id} {id} {id} {id}"), format!("{id} {id} {id} {id}")]);
        assert_eq!(self.status("Groups"), "");
        id
    }

    /// What the process's column of the tables promises.
    fn check(&self, column: &str) {
        for (row, mut cell) in promises(column) {
            if self.name == "kiln" {
                // A command in a jail is the process that its caller has started.
                cell = cell.replace("pid, ", "");
            }
            let holds = promise::holds(self, &row, &cell);
            assert!(holds, "{} ({column}): {row}: {cell}", self.name);
        }
    }

    fn check_files(&self, also: &[&str]) {
        let common = ["/dev/null", "pipe:", "socket:", "anon_inode:[event", "/memfd:"];
        for file in self.files() {
            let listed = common.iter().chain(also).any(|start| file.starts_with(start));
            assert!(listed, "{} has {file} open", self.name);
        }
    }

    fn check_vmm_or_devices(&self, column: &str, files: &[&str]) -> u32 {
        self.check(column);
        assert_eq!(self.root(), BTreeSet::new(), "{}", self.name);
        self.check_files(files);
        self.check_identity()
    }

    fn check_qemu(&self, kernel: &str) -> u32 {
        self.check("QEMU");
        let shown = ["bin", "etc", "gnu", "lib", "lib32", "lib64", "nix", "proc", "usr"];
        let seen = self.root();
        assert!(seen.iter().all(|name| shown.contains(&name.as_str())), "{seen:?}");
        self.check_files(&["anon_inode:[signalfd]", kernel]);
        self.check_identity()
    }

    fn check_fs(&self) {
        self.check("`kiln fs`");
        let exported = ["containers", "mounts", "rootfs", "volumes"].map(String::from);
        assert_eq!(self.root(), BTreeSet::from(exported));
    }
}

/// A line of a `/proc/PID/status`.
pub fn line(status: &str, field: &str) -> String {
    let line = status.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    line.expect("the field").split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The namespace of a process.
pub fn namespace(pid: &str, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).expect("namespace").to_string_lossy().into()
}

/// A started kiln, killed when dropped.
struct Running {
    child: Child,
    stage: Stage,
}

impl Running {
    /// Starts a command and waits for the first line that its guest says.
    fn start(stage: Stage, mut command: Command, first: &str) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("kiln starts");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut said = Vec::new();
        let last = *first.as_bytes().last().expect("not empty");
        while !String::from_utf8_lossy(&said).contains(first) {
            assert!(output.read_until(last, &mut said).expect("reads") > 0, "ended: {said:?}");
        }
        child.stdout = Some(output.into_inner());
        Self { child, stage }
    }

    /// The process of that name, which may have to appear first.
    fn process(&self, name: &str) -> Process {
        let start = Instant::now();
        loop {
            let mine = crate::run::processes_of(&self.stage);
            let mut named = mine.into_iter().map(|pid| {
                let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
                Process { pid, name: name.trim_end().to_owned() }
            });
            if let Some(process) = named.find(|process| process.name == name) {
                return process;
            }
            assert!(start.elapsed() < PATIENCE, "no process {name}");
            sleep(Duration::from_millis(20));
        }
    }

    fn end(mut self) {
        let pid = Pid::from_raw(self.child.id().cast_signed());
        kill(pid, Signal::SIGTERM).expect("signalled");
        self.child.wait().expect("ends");
        let start = Instant::now();
        while !crate::run::processes_of(&self.stage).is_empty() {
            assert!(start.elapsed() < PATIENCE, "processes are left");
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // After a failed check; whatever else kiln started ends with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The rows of the documentation's tables, for the process whose column begins so.
fn promises(column: &str) -> Vec<(String, String)> {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/jail.md");
    let text = fs::read_to_string(path).expect("the documentation");
    let mut rows = Vec::new();
    let mut place = None;
    for line in text.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        match (line.starts_with('|'), place) {
            (false, _) => place = None,
            // A heading of processes.
            (true, None) if cells[0].is_empty() => {
                place = cells.iter().position(|cell| cell.starts_with(column));
            }
            (true, Some(at)) if cells[0] != "---" => {
                rows.push((cells[0].to_owned(), cells[at].to_owned()));
            }
            (true, _) => {}
        }
    }
    assert!(!rows.is_empty(), "docs/jail.md has no column {column}");
    rows
}

fn machine(engine: &str, options: &[&OsStr]) -> Running {
    let stage = Stage::new(&["true"]);
    let image = stage.path().join("guest");
    fs::write(&image, IDLE.image).expect("written");
    let disk = stage.path().join("disk");
    fs::write(&disk, [0; 1 << 16]).expect("written");
    let mut command = stage.kiln();
    command.args(options);
    command.args(["vm", "run", "--memory", "128", "--engine", engine, "--kernel"]).arg(image);
    command.arg("--disk").arg(disk);
    Running::start(stage, command, ".")
}

#[test]
fn vmm_of_the_kvm_engine() {
    let running = machine("kvm", &[]);
    check_vmm(&running, "kiln", &["anon_inode:[signalfd]"]);
    assert_eq!(crate::run::processes_of(&running.stage).len(), 1, "more than the command");
    running.end();
}

/// With a log file, which nobody in a jail may write to, the machine has a process of its own.
#[test]
fn vmm_beside_a_command_that_is_needed() {
    let stage = Stage::new(&["true"]);
    let log = stage.path().join("log");
    let running = machine("kvm", &["--log".as_ref(), log.as_os_str()]);
    check_vmm(&running, "kiln-vmm", &[]);
    running.end();
}

fn check_vmm(running: &Running, name: &str, also: &[&str]) {
    let disk = running.stage.path().join("disk");
    let files = [&["/dev/kvm", "anon_inode:kvm-", disk.to_str().expect("text")], also].concat();
    running.process(name).check_vmm_or_devices("`kiln vmm`", &files);
}

#[test]
fn qemu_and_its_devices() {
    let running = machine("emulated", &[]);
    let folder = running.stage.path().to_str().expect("text").to_owned();
    let kernel = format!("{folder}/guest");
    let qemu = running.process("qemu-system-x86").check_qemu(&kernel);
    let devices = running.process("kiln-devices");
    let disk = format!("{folder}/disk");
    assert_eq!(devices.check_vmm_or_devices("`kiln devices`", &[&disk]), qemu);
    running.end();
}

#[test]
fn processes_of_a_container() {
    let stage =
        Stage::new(&["sh", "-c", "trap 'exit 0' TERM; echo running; while :; do sleep 1; done"]);
    let command = stage.run(&[]);
    let running = Running::start(stage, command, "running\n");
    let kernel = fs::canonicalize(crate::stage::lib_dir().join("vmlinux")).expect("a kernel");
    let qemu = running.process("qemu-system-x86").check_qemu(kernel.to_str().expect("text"));
    let devices = running.process("kiln-devices");
    assert_eq!(devices.check_vmm_or_devices("`kiln devices`", &[]), qemu);
    running.process("kiln-fs").check_fs();
    running.process("kiln-monitor").check("`kiln monitor`");
    let mut exec = running.stage.kiln();
    let exec = exec.args(["exec", "test", "sh", "-c", "echo executed; sleep 1000"]);
    let mut exec = exec.stdout(Stdio::piped()).spawn().expect("kiln starts");
    let mut output = BufReader::new(exec.stdout.take().expect("a pipe"));
    let mut said = String::new();
    output.read_line(&mut said).expect("reads");
    assert_eq!(said, "executed\n");
    running.process("kiln-exec").check("`kiln exec-proxy`");
    running.end();
    exec.wait().expect("ends");
}
