//! A step that takes all that it can get harms itself alone, and is told what ended it.

use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::stage::{Stage, errors, eventually, processes_of};

/// A step that asks for ever more memory.
const HOG: &str = "x=0123456789abcdef; while :; do x=$x$x; done";

/// Runs a script with these resources in a guest of 128 MiB.
fn run(script: &str, resources: Value) -> Output {
    let stage = Stage::new(&["sh", "-c", script]);
    stage.edit(|config| config["linux"]["resources"] = resources);
    let output = stage.run(&["--memory", "128"]).stdin(Stdio::null()).output().expect("kiln runs");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
    eventually("the end of every process", || processes_of(&stage).is_empty());
    output
}

#[test]
fn memory_limit_is_named_when_it_ended_the_step() {
    let output = run(HOG, json!({"memory": {"limit": 64 << 20}}));
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(137), "{errors}");
    let words = "kiln: the step's memory limit of 64 MiB was reached";
    assert!(errors.contains(words) && errors.contains("linux.resources.memory.limit"), "{errors}");
}

#[test]
fn guest_without_a_limit_survives_its_step() {
    let output = run(HOG, json!({}));
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(137), "{errors}");
    let words = "kiln: the guest's memory of 128 MiB was full";
    assert!(errors.contains(words) && errors.contains("--memory"), "{errors}");
}

#[test]
fn a_step_that_survives_is_not_told_of_those_it_lost() {
    let output = run(&format!("sh -c '{HOG}'; exit 0"), json!({"memory": {"limit": 64 << 20}}));
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(!errors(&output).contains("memory limit"), "{}", errors(&output));
}

#[test]
fn processes_are_limited_without_a_limit() {
    // Each process starts two more, until there can't be any; then the step goes on by itself.
    let script = "f() { f & f & wait; }; f 2>/dev/null & sleep 5; echo went on; exit 4";
    let output = run(script, json!({}));
    // What is short of processes is short of memory too: the kernel may have chosen the step itself.
    let ended = (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned());
    let as_it_wished = ended == (Some(4), "went on\n".to_owned());
    let killed = ended.0 == Some(137) && errors(&output).contains("memory");
    assert!(as_it_wished || killed, "{ended:?}: {}", errors(&output));
}

#[test]
fn process_limit_refuses_more() {
    let script = "i=0; while [ $i -lt 40 ]; do sleep 1000 & i=$((i + 1)); done; echo unlimited";
    let output = run(script, json!({"pids": {"limit": 20}}));
    assert!(errors(&output).contains("can't fork"), "{}", errors(&output));
    assert_ne!(String::from_utf8_lossy(&output.stdout), "unlimited\n");
    assert_ne!(output.status.code(), Some(0));
}
