//! Guests that panic, hang, spin, fall silent or are late: each is ended from outside, in bounded time,
//! with a word of why.

use std::fs;
use std::io::Read;
use std::process::{Child, Command, Output, Stdio};

use kiln_protocol::{ExitStatus, FailurePhase, FromAgent};
use kiln_selftest_guests::{Guest, SPIN};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Host, marked, role};
use crate::script::{Script, exited, id};
use crate::stage::{Stage, create, errors, eventually, kiln, processes_of, succeeds};

/// A container whose agent plays a script.
struct Guested {
    stage: Stage,
    before: Host,
}

impl Guested {
    fn new(script: &Script, settings: &str) -> Self {
        let stage = marked(&["sleep", "1000"]);
        let before = Host::look(&stage);
        let lib = script.compile(&stage);
        let settings = format!("lib_dir = {lib:?}\n{settings}");
        fs::write(stage.path().join("kiln.toml"), settings).expect("written");
        Self { stage, before }
    }

    fn kiln(&self) -> Command {
        let mut command = self.stage.kiln();
        command.arg("--config").arg(self.stage.path().join("kiln.toml"));
        command
    }

    fn run(&self) -> Command {
        let mut command = self.kiln();
        command.args(["run", "--engine", "emulated", "--bundle"]).arg(self.stage.bundle());
        command.arg(id()).stdin(Stdio::null());
        command
    }

    /// Runs the container in the background, until it is running.
    fn running(&self) -> Child {
        let child = self.run().stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
        let child = child.expect("kiln");
        until_it_runs(&self.stage);
        child
    }

    /// Runs the container to its end, of which kiln says this.
    fn ends_with(&self, code: i32, words: &[&str]) {
        self.is_over(&self.run().output().expect("kiln"), code, words);
    }

    fn is_over(&self, output: &Output, code: i32, words: &[&str]) {
        let errors = errors(output);
        assert_eq!(output.status.code(), Some(code), "{errors}");
        for word in words {
            assert!(errors.contains(word), "{word:?} is missing in: {errors}");
        }
        self.before.is_as_before(&self.stage);
    }
}

fn until_it_runs(stage: &Stage) {
    eventually("running", || {
        let state = kiln(stage, &["state", "test"]);
        String::from_utf8_lossy(&state.stdout).contains("\"running\"")
    });
}

/// One whose container runs.
fn started() -> Script {
    Script::created().say(&FromAgent::Started { container: id() })
}

#[test]
fn panic_is_told_with_the_consoles_last_lines() {
    let panicked = ["the guest has ended by itself", "Attempted to kill init"];
    Guested::new(&started().exit(), "").ends_with(1, &panicked);
    // Before the agent has said anything.
    Guested::new(&Script::default().exit(), "").ends_with(1, &panicked);
}

#[test]
fn kernel_that_hangs_is_given_up_at_the_deadline() {
    // With panic=0 a kernel that has panicked stands still for ever.
    let settings = "agent_deadline = 20\nkernel_args = \"panic=0\"\n";
    let words = ["did not answer within 20 s; last phase reached: boot", "Kernel panic"];
    Guested::new(&Script::default().exit(), settings).ends_with(1, &words);
}

#[test]
fn running_guest_that_hangs_ends_when_it_is_killed() {
    let settings = "shutdown_deadline = 3\nkernel_args = \"panic=0\"\n";
    let switched_off = "the guest did not end the container after SIGKILL: it is switched off";
    for script in [started().exit(), started().spin(), started()] {
        let guested = Guested::new(&script, settings);
        let child = guested.running();
        // A signal that its program could take is delivered, as far as anybody knows.
        succeeds(&guested.stage, &["kill", "test", "TERM"]);
        succeeds(&guested.stage, &["kill", "test", "KILL"]);
        let output = child.wait_with_output().expect("ends");
        guested.is_over(&output, 137, &[switched_off]);
    }
}

#[test]
fn guest_that_hangs_is_deleted_by_force_and_goes_with_its_command() {
    let guested = Guested::new(&started().spin(), "");
    let mut create = guested.kiln();
    create.args(["run", "--detach", "--engine", "emulated", "--bundle"]);
    create.arg(guested.stage.bundle()).arg(id()).stdin(Stdio::null());
    let said = guested.stage.path().join("said");
    create.stdout(Stdio::null()).stderr(fs::File::create(&said).expect("file"));
    let status = create.status().expect("kiln");
    assert!(status.success(), "{}", fs::read_to_string(&said).expect("readable"));
    assert_eq!(guested.stage.state()["status"], "running");
    succeeds(&guested.stage, &["delete", "--force", "test"]);
    guested.before.is_as_before(&guested.stage);

    let mut child = guested.running();
    child.kill().expect("killed");
    child.wait().expect("ends");
    guested.before.is_as_before(&guested.stage);
}

#[test]
fn signal_that_nobody_hears_ends_the_sandbox() {
    let guested = Guested::new(&started(), "create_deadline = 5\n");
    let child = guested.running();
    kill(Pid::from_raw(child.id().try_into().expect("a pid")), Signal::SIGTERM).expect("sent");
    let why = "the guest's agent did not answer within 5 s, after a signal that was to end";
    guested.is_over(&child.wait_with_output().expect("ends"), 1, &[why]);
}

#[test]
fn silent_agent_is_not_waited_for_by_later_commands() {
    let guested = Guested::new(&started(), "create_deadline = 8\n");
    let mut child = guested.running();
    let told = |args: &[&str], code: i32, words: &str| {
        let output = kiln(&guested.stage, args);
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {errors}");
        assert!(errors.contains(words), "{args:?}: {errors}");
    };
    let late = "the guest's agent did not answer within 8 s";
    std::thread::scope(|scope| {
        for args in [&["ps", "test"][..], &["pause", "test"], &["events", "--stats", "test"]] {
            scope.spawn(move || told(args, 1, late));
        }
        let late = "exec failed: the guest's agent did not execute it within 8 s";
        scope.spawn(move || told(&["exec", "test", "true"], 255, late));
    });
    assert_eq!(guested.stage.state()["status"], "running");
    kill(Pid::from_raw(child.id().try_into().expect("a pid")), Signal::SIGKILL).expect("sent");
    child.wait().expect("ends");
    guested.before.is_as_before(&guested.stage);
}

#[test]
fn late_agent_is_waited_for_until_the_deadline() {
    let script = Script::greeted().pause(3).say(&FromAgent::Created { container: id() }).read();
    let script = script.pause(3).say(&FromAgent::Started { container: id() }).say(&exited());
    Guested::new(&script, "shutdown_deadline = 2\n").ends_with(0, &[]);
    let script = Script::greeted().pause(30).say(&FromAgent::Created { container: id() });
    let late = "the guest's agent did not set the container up within 5 s; last phase reached: \
                container set-up";
    Guested::new(&script, "create_deadline = 5\n").ends_with(1, &[late]);
}

#[test]
fn start_that_crosses_a_kill_is_no_fault() {
    let killed =
        FromAgent::Exited { container: id(), status: ExitStatus::Signal(9), oom_killed: false };
    let failed = FromAgent::Failed {
        container: id(),
        phase: FailurePhase::Exec,
        message: "container \"test\" does not exist".to_owned(),
        exit_code: 1,
    };
    let script = Script::created().say(&killed).say(&failed);
    let guested = Guested::new(&script, "shutdown_deadline = 2\n");
    let output = guested.run().output().expect("kiln");
    guested.is_over(&output, 137, &[]);
    assert!(!errors(&output).contains("the guest's agent sent"), "{}", errors(&output));
}

/// A machine of either engine whose CPU spins.
fn spinning(stage: &Stage, engine: &str, global: &[&str], guest: Guest) -> Child {
    let image = stage.path().join(guest.name);
    fs::write(&image, guest.image).expect("written");
    let mut command = stage.kiln();
    command.args(global).args(["vm", "run", "--engine", engine, "--memory", "32", "--kernel"]);
    command.arg(image).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kiln");
    let mut byte = [0];
    let stdout = child.stdout.as_mut().expect("a pipe");
    assert_eq!(stdout.read(&mut byte).expect("reads"), 1, "{engine}: ended early");
    child
}

#[test]
fn spinning_machine_ends_by_a_signal_and_with_its_command() {
    let stage = marked(&["true"]);
    let before = Host::look(&stage);
    let log = stage.path().join("log");
    // With a log file the machine of the kvm engine is another process.
    let apart = ["--log", log.to_str().expect("text")];
    for (engine, global) in [("kvm", &[][..]), ("kvm", &apart), ("emulated", &[])] {
        let child = spinning(&stage, engine, global, SPIN);
        let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
        kill(pid, Signal::SIGTERM).expect("sent");
        let output = child.wait_with_output().expect("ends");
        assert_eq!(output.status.code(), Some(143), "{engine}: {}", errors(&output));
        assert!(errors(&output).contains("ended by signal 15"), "{}", errors(&output));

        let mut child = spinning(&stage, engine, global, SPIN);
        child.kill().expect("killed");
        child.wait().expect("ends");
        before.is_as_before(&stage);
    }
}

#[test]
fn machine_whose_process_dies_is_told() {
    let stage = marked(&["sleep", "1000"]);
    let before = Host::look(&stage);
    for (victim, named) in [
        ("file system", "file system process was killed by SIGKILL"),
        ("devices", "device process was killed by SIGKILL"),
        ("QEMU", "QEMU was killed by SIGKILL"),
        ("monitor", "the sandbox's monitor was killed by SIGKILL without an outcome"),
    ] {
        let child = stage.run(&[]).stdin(Stdio::null()).stderr(Stdio::piped()).spawn();
        let child = child.expect("kiln");
        until_it_runs(&stage);
        let found = processes_of(&stage).into_iter().find(|pid| role(*pid) == victim);
        kill(Pid::from_raw(found.expect("there")), Signal::SIGKILL).expect("sent");
        let output = child.wait_with_output().expect("ends");
        assert_eq!(output.status.code(), Some(1), "{victim}: {}", errors(&output));
        assert!(errors(&output).contains(named), "{victim}: {}", errors(&output));
        before.is_as_before(&stage);
    }
}

#[test]
fn file_system_process_that_dies_with_the_guest_leaves_the_steps_status() {
    let status = ExitStatus::Code(3);
    let ended = FromAgent::Exited { container: id(), status, oom_killed: false };
    // The guest does not end by itself, as one that waits for its files.
    let guested = Guested::new(&started().say(&ended), "shutdown_deadline = 60\n");
    let log = guested.stage.path().join("log");
    let mut command = guested.kiln();
    command.arg("--log").arg(&log).args(["run", "--engine", "emulated", "--bundle"]);
    command.arg(guested.stage.bundle()).arg(id()).stdin(Stdio::null());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().expect("kiln");
    let logged = || fs::read_to_string(&log).unwrap_or_default();
    let step_is_over = |line: &str| line.contains("phase has ended") && line.contains("\"step\"");
    eventually("the guest is to end", || logged().lines().any(step_is_over));
    let server = processes_of(&guested.stage).into_iter().find(|pid| role(*pid) == "file system");
    kill(Pid::from_raw(server.expect("there")), Signal::SIGKILL).expect("sent");
    let output = child.wait_with_output().expect("ends");
    guested.is_over(&output, 3, &[]);
    let logged = logged();
    assert!(logged.contains("file system process was killed by SIGKILL"), "{logged}");
    assert!(!logged.contains("did not end in time"), "{logged}");
}

#[test]
fn frozen_sandbox_is_deleted_by_force() {
    let stage = marked(&["sleep", "1000"]);
    let before = Host::look(&stage);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let groups = fs::read_to_string(format!("/proc/{}/cgroup", stage.state()["pid"]));
    let groups = groups.expect("proc");
    let of = |controller: &str| {
        let mut lines = groups.lines().map(|line| line.splitn(3, ':').collect::<Vec<_>>());
        lines.find(|fields| fields[1] == controller).map(|fields| fields[2].to_owned())
    };
    // Of whichever version the machine's cgroups are.
    let (file, frozen) = match of("freezer") {
        Some(path) => (format!("/sys/fs/cgroup/freezer{path}/freezer.state"), "FROZEN"),
        None => (format!("/sys/fs/cgroup{}/cgroup.freeze", of("").expect("version 2")), "1"),
    };
    fs::write(file, frozen).expect("frozen");
    succeeds(&stage, &["delete", "--force", "test"]);
    before.is_as_before(&stage);
}
