//! A step that is a host: the distribution's programs, kiln, and every capability.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::stage::{Stage, lib_dir, processes_of};

/// Set in there.
const WITHIN: &str = "KILN_NESTED_WITHIN";

/// Set for whoever has the time to wait until machines within the machine have booted.
const WHOLE: &str = "KILN_NESTED_WHOLE";

/// Where cgroups are in there: version 2 alone.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// How long a machine within the machine may take for what it does.
const PATIENCE: Duration = Duration::from_secs(1200);

/// A configuration with which the machine within the machine has its time.
const SETTINGS: &str = "agent_deadline = 1200\ncreate_deadline = 600\nshutdown_deadline = 300\n";

/// Runs a test on such a host: it is called again there, by its full name.
pub fn within(name: &str, test: fn()) {
    if is_within() {
        leave_top();
        return test();
    }
    // The first process reaps what others leave.
    let args = ["sh", "-c", "\"$@\" >/output 2>&1; exit $?", "sh", "/test", "--exact", name];
    expect_pass(&prepare(&args));
}

/// Whether this is such a host.
pub fn is_within() -> bool {
    std::env::var_os(WITHIN).is_some()
}

/// Whether machines within the machine are waited for.
pub fn is_whole() -> bool {
    std::env::var_os(WHOLE).is_some()
}

/// A step that runs a program on such a host, with this very program at `/test`.
pub fn prepare(args: &[&str]) -> Stage {
    let stage = Stage::new(args);
    let rootfs = stage.rootfs();
    fs::remove_dir_all(rootfs.join("bin")).expect("removed");
    for (link, target) in
        [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")]
    {
        std::os::unix::fs::symlink(target, rootfs.join(link)).expect("link");
    }
    for directory in ["usr", "run", "var", "root", "etc/kiln"] {
        fs::create_dir_all(rootfs.join(directory)).expect("directory");
    }
    for file in ["/etc/passwd", "/etc/group"] {
        fs::copy(file, rootfs.join(&file[1..])).expect("copied");
    }
    fs::write(rootfs.join("etc/kiln/config.toml"), SETTINGS).expect("written");
    add(&std::env::current_exe().expect("this program"), &rootfs.join("test"));
    let kiln = Path::new(env!("CARGO_BIN_EXE_kiln"));
    add(kiln, &rootfs.join(kiln.strip_prefix("/").expect("absolute")));
    let lib = rootfs.join("lib-kiln");
    fs::create_dir(&lib).expect("directory");
    for file in fs::read_dir(lib_dir()).expect("KILN_LIB_DIR") {
        let file = file.expect("an entry");
        fs::copy(file.path(), lib.join(file.file_name())).expect("copied");
    }
    let all: Vec<_> = capctl::Cap::iter().map(|capability| capability.to_string()).collect();
    stage.edit(|config| {
        let process = &mut config["process"];
        let mut environment = vec![
            "PATH=/usr/bin:/usr/sbin".to_owned(),
            "container=kiln".to_owned(),
            "KILN_LIB_DIR=/lib-kiln".to_owned(),
            format!("{WITHIN}=1"),
        ];
        environment.extend(is_whole().then(|| format!("{WHOLE}=1")));
        process["env"] = json!(environment);
        process["capabilities"] = json!({"bounding": all, "effective": all, "permitted": all});
        config["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
            {"type": "cgroup"}, {"type": "network"},
        ]);
        let mount = |destination: &str, kind: &str| {
            json!({"destination": destination, "type": kind, "source": kind})
        };
        config["mounts"] = json!([
            mount("/proc", "proc"),
            mount("/dev", "tmpfs"),
            mount("/dev/shm", "tmpfs"),
            mount("/sys", "sysfs"),
            {"destination": CGROUPS, "type": "cgroup", "source": "cgroup", "options": ["rw"]},
            mount("/run", "tmpfs"),
            mount("/tmp", "tmpfs"),
            {"destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"]},
        ]);
    });
    stage
}

/// Runs a step in which the test is called, with what it says in `/output`.
pub fn expect_pass(stage: &Stage) {
    let mut run = stage.run(&["--memory", "2560", "--cpus", "1"]);
    let output = run.stdin(Stdio::null()).output().expect("kiln");
    let said = fs::read_to_string(stage.rootfs().join("output")).unwrap_or_default();
    let passed = output.status.success() && said.contains(" 1 passed");
    let whole = [&*output.stdout, &*output.stderr].concat();
    assert!(passed, "{}\n{said}{}", output.status, String::from_utf8_lossy(&whole));
}

/// Programs of a debug build are large, and are read through the share.
fn add(program: &Path, at: &Path) {
    fs::create_dir_all(at.parent().expect("a directory")).expect("made");
    let strip = Command::new("strip").args(["--strip-debug", "-o"]).arg(at).arg(program).status();
    assert!(strip.expect("strip").success());
}

/// Directories with processes can't pass controllers on: nobody stays at the top.
fn leave_top() {
    let caller = Path::new(CGROUPS).join("caller");
    fs::create_dir(&caller).expect("made");
    let processes = fs::read_to_string(Path::new(CGROUPS).join("cgroup.procs")).expect("processes");
    for process in processes.lines() {
        fs::write(caller.join("cgroup.procs"), process).expect("moved");
    }
}

/// `kiln create` of the bundle as `test`, with options that stand before the verb: it is there once its
/// guest has booted.
pub fn begin(stage: &Stage, options: &[&str]) -> Child {
    let file = |name| fs::File::create(stage.path().join(name)).expect("file");
    let mut command = stage.kiln();
    command.args(options).args(["create", "--engine", "emulated", "--memory", "128", "--bundle"]);
    command.arg(stage.bundle()).arg("test").stdin(Stdio::null());
    command.stdout(file("output")).stderr(file("errors")).spawn().expect("kiln")
}

/// Waits until the processes of a container that is being created are in its cgroup: all of them, and no
/// others. Gives their number.
pub fn await_processes(stage: &Stage, command: &Child, cgroup: &str) -> usize {
    let mut found: Vec<i32> = Vec::new();
    eventually("every process in the cgroup", || {
        let path = format!("{CGROUPS}{cgroup}/cgroup.procs");
        let text = fs::read_to_string(path).unwrap_or_default();
        found = text.lines().filter_map(|pid| pid.parse().ok()).collect();
        let mut expected = processes_of(stage);
        expected.retain(|pid| u32::try_from(*pid) != Ok(command.id()));
        found.sort_unstable();
        expected.sort_unstable();
        // Monitor, file system, devices, QEMU.
        found.len() >= 4 && found == expected
    });
    found.len()
}

/// Waits until the container has been created.
pub fn await_end(stage: &Stage, mut command: Child) {
    let status = command.wait().expect("ends");
    let errors = fs::read_to_string(stage.path().join("errors")).expect("errors");
    assert!(status.success(), "{errors}");
}

/// Calls a creation off, which undoes it.
pub fn call_off(mut command: Child) {
    let pid = Pid::from_raw(i32::try_from(command.id()).expect("a pid"));
    kill(pid, Signal::SIGTERM).expect("it runs");
    assert!(!command.wait().expect("ends").success());
}

/// Waits until a condition holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// What a file of a cgroup has.
pub fn read(cgroup: &str, file: &str) -> String {
    let path = format!("{CGROUPS}{cgroup}/{file}");
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    text.trim().to_owned()
}
