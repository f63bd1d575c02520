//! Steps that run longer than they may.

use std::fs;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::lifecycle::{succeeds, wait_for};
use crate::run::wait_for_line;
use crate::stage::{Stage, errors, eventually, processes_of};

const WORDS: &str = "has passed, and it was ended";

/// `kiln`, with so many seconds for a step to end by itself.
fn kiln(stage: &Stage, grace: u32) -> Command {
    let config = stage.path().join("config.toml");
    fs::write(&config, format!("shutdown_deadline = {grace}\n")).expect("written");
    let mut command = stage.kiln();
    command.arg("--config").arg(config);
    command
}

/// `kiln run` likewise, with a deadline.
fn run(stage: &Stage, grace: u32, deadline: &str) -> Command {
    let mut command = kiln(stage, grace);
    command.args(["run", "--engine", "emulated", "--deadline", deadline, "--bundle"]);
    command.arg(stage.bundle()).arg("test").stdin(Stdio::null());
    command
}

#[test]
fn a_step_past_its_deadline_may_end_by_itself_and_has_failed_all_the_same() {
    let script = "trap 'echo asked; exit 0' TERM; sleep 1000 & wait";
    let stage = Stage::new(&["sh", "-c", script]);
    // Long enough for the shell to have set its trap by then.
    let output = run(&stage, 100, "8s").output().expect("kiln");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(124), "{errors}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "asked\n", "{errors}");
    let line = errors.lines().find(|line| line.contains(WORDS)).expect("the limit is named");
    assert!(line.contains("deadline of 8 s") && line.contains("raise --deadline"), "{errors}");
    assert!(stage.is_clean());
}

#[test]
fn a_step_that_ends_in_time_does_not_hear_of_its_deadline() {
    let stage = Stage::new(&["sh", "-c", "echo in time; exit 3"]);
    let output = run(&stage, 10, "1h").output().expect("kiln");
    assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
    assert!(!errors(&output).contains(WORDS), "{}", errors(&output));
}

#[test]
fn a_step_that_will_not_end_is_killed_paused_or_not_and_its_state_says_why() {
    let stage = Stage::new(&["sh", "-c", "trap '' TERM; while :; do :; done"]);
    stage.edit(|config| {
        config["annotations"] =
            json!({"io.kiln.deadline": "3", "io.kiln.limit-reached": "made up"});
    });
    let mut create = kiln(&stage, 3);
    create.args(["create", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    let created = create.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(created.expect("kiln").success());
    assert_eq!(stage.state()["annotations"].get("io.kiln.limit-reached"), None);
    succeeds(&stage, &["start", "test"]);
    // On a busy machine this may come too late to make a difference.
    stage.kiln().args(["pause", "test"]).stderr(Stdio::null()).status().expect("kiln");
    wait_for(&stage, "stopped");
    assert_eq!(stage.state()["annotations"]["io.kiln.limit-reached"], "deadline");
    eventually("the end of every process", || processes_of(&stage).is_empty());
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn a_guest_that_does_nothing_any_more_is_switched_off() {
    let stage = Stage::new(&["sh", "-c", "echo up; sleep 1000"]);
    let mut command = run(&stage, 2, "5s");
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kiln");
    wait_for_line(&mut child, "up");
    let is_machine = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.starts_with("qemu")
    };
    let machine = processes_of(&stage).into_iter().find(is_machine).expect("QEMU");
    kill(Pid::from_raw(machine), Signal::SIGSTOP).expect("stopped");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(124), "{}", errors(&output));
    assert!(errors(&output).contains(WORDS), "{}", errors(&output));
    assert!(stage.is_clean());
    eventually("the end of every process", || processes_of(&stage).is_empty());
}
