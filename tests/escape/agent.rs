//! An agent that was taken over answers the monitor with anything: the sandbox ends with what it did,
//! and nothing is left.
//!
//! The guest is real; in the agent's place is a program that plays a script ([`Script`]).

use std::fs;
use std::process::Output;

use kiln_protocol::{FailurePhase, FromAgent, MAX_FROM_AGENT, VERSION};

use crate::script::{Script, exited, hello, id};
use crate::stage::{Stage, errors, eventually, processes_of};

impl Script {
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
fn words_that_a_terminal_would_act_on() {
    let message = format!(r#"{{"\u001b[2J{}":{{}}}}"#, "x".repeat(100_000)).into_bytes();
    let frame = [(message.len() as u32).to_le_bytes().to_vec(), message].concat();
    let output = Script::greeted().send(&frame).run();
    let errors = errors(&output);
    assert!(errors.contains("unknown variant `[2Jxxx"), "{errors:?}");
    assert!(!errors.contains('\x1b') && !errors.contains(&"x".repeat(300)), "{errors:?}");
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
