//! An agent that was taken over answers the monitor with anything: the sandbox ends with what it did,
//! and nothing is left.
//!
//! The guest is real; in the agent's place is a program that plays a script ([`Script`]).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use kiln_protocol::frame::encode;
use kiln_protocol::{CONTROL_PORT, ExitStatus, FailurePhase, FromAgent, MAX_FROM_AGENT, VERSION};

use crate::stage::{Stage, errors, eventually, lib_dir, processes_of};

/// What the agent does.
#[derive(Default)]
struct Script(Vec<u8>);

impl Script {
    /// One that has said hello, and been welcomed and told to create a container.
    fn greeted() -> Self {
        Self::default().say(&hello()).read().read()
    }

    /// One whose container is set up and told to start.
    fn created() -> Self {
        Self::greeted().say(&FromAgent::Created { container: id() }).read()
    }

    fn say(self, message: &FromAgent) -> Self {
        self.send(&encode(message, usize::MAX).expect("encodes"))
    }

    fn send(self, bytes: &[u8]) -> Self {
        self.step(b's', bytes)
    }

    fn flood(self, bytes: &[u8]) -> Self {
        self.step(b'f', bytes)
    }

    fn step(mut self, kind: u8, bytes: &[u8]) -> Self {
        self.0.push(kind);
        self.0.extend((bytes.len() as u32).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    fn read(mut self) -> Self {
        self.0.push(b'r');
        self
    }

    fn close(mut self) -> Self {
        self.0.push(b'c');
        self
    }

    fn connect_more(mut self) -> Self {
        self.0.push(b'n');
        self
    }

    /// A folder with the kernel and, as the agent, a program that plays the script.
    fn compile(&self, stage: &Stage) -> PathBuf {
        let lib = stage.path().join("lib");
        fs::create_dir(&lib).expect("made");
        std::os::unix::fs::symlink(lib_dir().join("vmlinux"), lib.join("vmlinux")).expect("linked");
        let bytes: Vec<String> = self.0.iter().map(u8::to_string).collect();
        let header = stage.path().join("script.h");
        let script = format!(
            "enum {{ PORT = {CONTROL_PORT} }};\nstatic const unsigned char SCRIPT[] = {{{}}};\n",
            bytes.join(",")
        );
        fs::write(&header, script).expect("written");
        let compiled = Command::new("gcc")
            .args(["-static", "-O2", "-Wall", "-Werror", "-s", "-include"])
            .arg(header)
            .arg("-o")
            .arg(lib.join("kiln-agent"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape/agent.c"))
            .status();
        assert!(compiled.expect("gcc must be installed").success(), "agent.c does not compile");
        lib
    }

    /// Runs a container with such an agent; gives what kiln said.
    fn run(&self) -> Output {
        let stage = Stage::new(&["true"]);
        let lib = self.compile(&stage);
        let config = stage.path().join("kiln.toml");
        fs::write(&config, "create_deadline = 10\nshutdown_deadline = 5\n").expect("written");
        let mut command = stage.kiln();
        command.arg("--config").arg(config).arg("--lib-dir").arg(lib);
        command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg(id());
        let output = command.output().expect("kiln runs");
        assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
        eventually("the end of every process", || processes_of(&stage).is_empty());
        output
    }

    /// Checks that kiln gives up with these words.
    fn ends_with(&self, words: &str) {
        let output = self.run();
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        assert!(errors.contains(words), "{words:?} is missing in: {errors}");
        assert!(errors.len() < 64 << 10, "{} bytes of errors", errors.len());
    }
}

fn id() -> String {
    "test".to_owned()
}

fn hello() -> FromAgent {
    let (version, kernel) = ("0.1.0".to_owned(), "6.12".to_owned());
    FromAgent::Hello { protocol: VERSION, version, kernel }
}

fn exited() -> FromAgent {
    FromAgent::Exited { container: id(), status: ExitStatus::Code(0), oom_killed: false }
}

#[test]
fn frames_that_claim_too_much() {
    let claim = [(MAX_FROM_AGENT as u32 + 1).to_le_bytes().to_vec(), vec![b' '; 4096]].concat();
    Script::default().send(&claim).ends_with("exceeds the limit of");
}

#[test]
fn another_version() {
    let (version, kernel) = ("0.0.9".to_owned(), "6.12".to_owned());
    let hello = FromAgent::Hello { protocol: VERSION + 1, version, kernel };
    let words = format!("the guest's agent (version 0.0.9) speaks protocol {}", VERSION + 1);
    Script::default().say(&hello).ends_with(&words);
}

#[test]
fn bytes_that_are_no_message() {
    let nested = vec![b'['; 100_000];
    let frame = [(nested.len() as u32).to_le_bytes().to_vec(), nested].concat();
    Script::greeted().send(&frame).ends_with("broke the protocol");
}

#[test]
fn success_without_a_start() {
    Script::greeted().say(&exited()).ends_with("while it was to set the container up");
}

#[test]
fn another_container() {
    let other = FromAgent::Created { container: "another".to_owned() };
    Script::greeted().say(&other).ends_with("a container that it does not have");
}

#[test]
fn everything_twice() {
    Script::default().say(&hello()).say(&hello()).ends_with("the guest's agent sent a greeting");
}

#[test]
fn silence() {
    Script::greeted().ends_with("did not set the container up within 10 s");
}

#[test]
fn a_word_that_is_never_finished() {
    let begun = [1000u32.to_le_bytes().to_vec(), b"{\"created\":".to_vec()].concat();
    Script::greeted().send(&begun).ends_with("did not set the container up within 10 s");
}

#[test]
fn a_flood() {
    // White space before a message that never comes is all that JSON allows.
    let frame = [(MAX_FROM_AGENT as u32).to_le_bytes().to_vec(), vec![b' '; 65536]].concat();
    Script::greeted().flood(&frame).ends_with("broke the protocol");
}

#[test]
fn a_hang_up() {
    Script::created().close().ends_with("closed its connection");
}

#[test]
fn a_failure_that_would_write_to_the_terminal() {
    let failed = FromAgent::Failed {
        container: id(),
        phase: FailurePhase::Exec,
        message: format!("\x1b]0;owned\x07{}", "x".repeat(1 << 20)),
        exit_code: 1,
    };
    let output = Script::greeted().say(&failed).run();
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("]0;ownedxxx") && !errors.contains('\x1b'), "{errors}");
    assert!(errors.len() < 16 << 10, "{} bytes of errors", errors.len());
}

#[test]
fn connections_without_end() {
    let script = Script::greeted().connect_more();
    script.say(&exited()).ends_with("while it was to set the container up");
}

#[test]
fn a_guest_that_goes_on_after_its_end() {
    // It says that the container has ended, keeps its streams open, and does not end itself.
    let started = FromAgent::Started { container: id() };
    let output = Script::created().say(&started).say(&exited()).run();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
}
