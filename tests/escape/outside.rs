//! The host's limits of a sandbox, while a guest that was taken over, or whoever has taken over the
//! process that runs it, takes as much as he gets. What the guest's kernel limits is nothing to him.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use kiln_protocol::FromAgent;
use serde_json::{Value, json};

use crate::script::{Script, id};
use crate::stage::{Stage, errors, eventually, kiln, processes_of, succeeds};

/// A sandbox's cgroup, by a path that no other test has.
struct Group {
    path: String,
}

impl Group {
    /// Has a stage's sandbox in a cgroup of its own, with these resources.
    fn of(stage: &Stage, resources: Value) -> Self {
        let name = stage.path().file_name().expect("a name").to_string_lossy().into_owned();
        let path = format!("/kiln-test-{name}");
        stage.edit(|config| {
            config["linux"]["cgroupsPath"] = json!(path);
            config["linux"]["resources"] = resources;
        });
        Self { path }
    }

    /// Its directory for a controller, in the hierarchy of version 1 or that of version 2.
    fn directory(&self, controller: &str) -> PathBuf {
        let places = [format!("/sys/fs/cgroup/{controller}"), "/sys/fs/cgroup".to_owned()];
        let found = places.into_iter().map(|place| PathBuf::from(place + &self.path));
        found.into_iter().find(|path| path.exists()).expect("a cgroup")
    }

    /// A number from a file, that of version 1 or that of version 2.
    fn number(&self, controller: &str, v1: &str, v2: (&str, &str)) -> u64 {
        let directory = self.directory(controller);
        let text = fs::read_to_string(directory.join(v1)).or_else(|_| {
            let text = fs::read_to_string(directory.join(v2.0))?;
            let line = text.lines().find_map(|line| line.strip_prefix(v2.1));
            std::io::Result::Ok(line.unwrap_or_default().to_owned())
        });
        text.expect("a file").trim().parse().expect("a number")
    }

    /// CPU time that its processes have used.
    fn cpu_time(&self) -> Duration {
        match self.number("cpuacct", "cpuacct.usage", ("cpu.stat", "usage_usec ")) {
            time if self.directory("cpuacct").join("cpuacct.usage").exists() => {
                Duration::from_nanos(time)
            }
            time => Duration::from_micros(time),
        }
    }
}

/// Compiles `greedy.c`.
fn greedy(stage: &Stage, greed: &str) -> PathBuf {
    let program = stage.path().join("qemu-greedy");
    let compiled = Command::new("gcc")
        .args(["-static", "-O2", "-Wall", "-Werror", "-s", greed, "-o"])
        .arg(&program)
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape/greedy.c"))
        .status();
    assert!(compiled.expect("gcc must be installed").success(), "greedy.c does not compile");
    program
}

/// Runs the bundle with a program in QEMU's place.
fn run_in_place_of_qemu(stage: &Stage, program: &Path) -> Output {
    let config = stage.path().join("kiln.toml");
    let text = format!("qemu = {program:?}\nagent_deadline = 8\n");
    fs::write(&config, text).expect("written");
    let mut command = stage.kiln();
    command.arg("--config").arg(config);
    command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg(id());
    let output = command.stdin(Stdio::null()).output().expect("kiln runs");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
    eventually("the end of every process", || processes_of(stage).is_empty());
    output
}

#[test]
fn memory_of_the_host() {
    let stage = Stage::new(&["true"]);
    let _group = Group::of(&stage, json!({"memory": {"limit": 32 << 20}}));
    let output = run_in_place_of_qemu(&stage, &greedy(&stage, "-DMEMORY"));
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    // The guest has 32 MiB, a 32nd of that and 96 MiB, its files as much again; the emulated engine
    // 256 + 1024 MiB.
    let words = ["QEMU was killed by SIGKILL", "for want of memory", "1538 MiB", "memory.limit"];
    for word in words {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
}

#[test]
fn processes_of_the_machine() {
    let stage = Stage::new(&["true"]);
    let output = run_in_place_of_qemu(&stage, &greedy(&stage, "-DTASKS"));
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    let said = errors.lines().find_map(|line| line.trim().strip_suffix(" processes"));
    let count: u32 = said.expect("it says how many").parse().expect("a number");
    // All that have the sandbox's user count, `kiln devices` too.
    assert!((200..256).contains(&count), "{count}");
}

/// Whoever has no limit of his own, as `kiln fs` has none, is held to the cgroup's.
#[test]
fn processes_of_all_parts_together() {
    let stage = Stage::new(&["sleep", "1000"]);
    let group = Group::of(&stage, json!({"pids": {"limit": 8}}));
    starts(&stage, stage.kiln(), &[]);
    let output = fs::File::create(stage.path().join("count")).expect("a file");
    let tasks = group.directory("pids").join("cgroup.procs");
    let mut command = Command::new(greedy(&stage, "-DTASKS"));
    command.stdin(Stdio::null()).stdout(output).env("KILN_TEST", stage.root());
    // SAFETY: only system calls are made: so short a path takes no memory.
    unsafe { command.pre_exec(move || fs::write(&tasks, "0")) };
    let mut stray = command.spawn().expect("started");
    let said = || fs::read_to_string(stage.path().join("count")).expect("read");
    eventually("the limit", || said().contains(" processes"));
    let count: u64 = said().trim().trim_end_matches(" processes").parse().expect("a number");
    assert!((400..8 + 512).contains(&count), "{count}");
    assert_eq!(group.number("pids", "pids.current", ("pids.current", "")), 8 + 512);

    // Whoever asks for one more is told which limit that is.
    let exec = kiln(&stage, &["exec", "test", "true"]);
    assert!(!exec.status.success());
    assert!(errors(&exec).contains("pids.max"), "{}", errors(&exec));
    assert_eq!(stage.state()["status"], "running");
    succeeds(&stage, &["delete", "--force", "test"]);
    stray.wait().expect("killed with the sandbox");
    eventually("the end of every process", || processes_of(&stage).is_empty());
    assert!(stage.is_clean());
}

/// Runs the bundle in the background.
fn starts(stage: &Stage, mut command: Command, options: &[&str]) {
    command.args(["run", "--detach", "--engine", "emulated", "--bundle"]).arg(stage.bundle());
    command.args(options).arg(id()).stdin(Stdio::null()).stdout(Stdio::null());
    let errors = stage.path().join("errors");
    command.stderr(fs::File::create(&errors).expect("a file"));
    let status = command.status().expect("kiln runs");
    assert!(status.success(), "{}", fs::read_to_string(errors).expect("errors"));
}

/// The guest's kernel limits nothing any more, and every vCPU spins.
#[test]
fn cpu_time_of_the_machine() {
    const CPUS: u8 = 2;
    // Less than what is left for it on any machine that the tests run on.
    const QUOTA: f64 = 0.05;
    const WATCHED: Duration = Duration::from_secs(3);
    // Time that was granted before and not used: a period of it, and a slice on each CPU.
    const SAVED: Duration = Duration::from_millis(200);

    let stage = Stage::new(&["true"]);
    let group = Group::of(&stage, json!({"cpu": {"quota": 5_000, "period": 100_000}}));
    let script = Script::created().say(&FromAgent::Started { container: id() }).spin_on(CPUS);
    let lib = script.compile(&stage);
    let mut command = stage.kiln();
    command.arg("--lib-dir").arg(lib);
    starts(&stage, command, &["--cpus", &CPUS.to_string()]);

    let begin = Instant::now();
    let before = group.cpu_time();
    thread::sleep(WATCHED);
    let used = group.cpu_time() - before;
    let most = begin.elapsed().mul_f64(QUOTA) + SAVED;
    assert!(used <= most, "{used:?} of at most {most:?}");
    // It is no test if nothing was held back.
    let throttled = || {
        let figures = fs::read_to_string(group.directory("cpu").join("cpu.stat")).expect("figures");
        let count = figures.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        count.expect("a count").parse::<u64>().expect("a number")
    };
    let so_far = throttled();
    eventually("the limit", || throttled() > so_far);
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}
