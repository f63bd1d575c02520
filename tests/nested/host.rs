//! A step that is a host: the distribution's programs, kiln, and every capability.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::stage::{Stage, lib_dir};

/// Set in there.
const WITHIN: &str = "KILN_NESTED";

/// Where cgroups are in there: version 2 alone.
pub const CGROUPS: &str = "/sys/fs/cgroup";

/// How long a machine within the machine may take for what it does.
const PATIENCE: Duration = Duration::from_secs(600);

/// A configuration with which the machine within the machine has its time.
const SETTINGS: &str = "agent_deadline = 600\ncreate_deadline = 300\nshutdown_deadline = 120\n";

/// Runs a test on such a host: it is called again there, by its full name.
pub fn within(name: &str, test: fn()) {
    if std::env::var_os(WITHIN).is_some() {
        leave_top();
        return test();
    }
    let stage = prepare(&["sh", "-c", "\"$@\"; exit $?", "sh", "/test", "--exact", name]);
    run(&stage);
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
        process["env"] = json!([
            "PATH=/usr/bin:/usr/sbin", "container=kiln", format!("{WITHIN}=1"),
            "KILN_LIB_DIR=/lib-kiln", "RUST_BACKTRACE=1",
        ]);
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

/// Runs a step in which the test is called.
pub fn run(stage: &Stage) {
    let mut run = stage.run(&["--memory", "2560", "--cpus", "1"]);
    let output = run.stdin(Stdio::null()).output().expect("kiln");
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && text.contains(" 1 passed"), "{text}\n{errors}");
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
