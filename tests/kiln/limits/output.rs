//! Steps that write more than they may to standard output and error.

use std::process::{Output, Stdio};

use serde_json::json;

use crate::stage::{Stage, errors};

const LIMIT: usize = 64 << 10;

fn run(stage: &Stage, options: &[&str]) -> Output {
    let output = stage.run(options).stdin(Stdio::null()).output().expect("kiln");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
    output
}

#[test]
fn a_step_that_writes_without_end_is_ended_and_what_it_may_write_arrives() {
    let output = run(&Stage::new(&["yes"]), &["--output-limit", "64K"]);
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(137), "{errors}");
    assert_eq!(output.stdout.len(), LIMIT);
    let words = "the step wrote more than its output limit of 64 KiB, and it was ended";
    assert!(errors.contains(words) && errors.contains("raise --output-limit"), "{errors}");
}

#[test]
fn both_streams_count_together_and_up_to_the_limit_nothing_happens() {
    let script = "head -c 40960 /dev/zero; head -c $1 /dev/zero >&2; exit 5";
    let stage = Stage::new(&["sh", "-c", script, "sh", "24576"]);
    stage.edit(|config| config["annotations"] = json!({"io.kiln.output-limit": "64K"}));
    let output = run(&stage, &[]);
    let written = |output: &Output| {
        let zeroes = output.stderr.iter().filter(|byte| **byte == 0).count();
        output.stdout.len() + zeroes
    };
    assert_eq!((output.status.code(), written(&output)), (Some(5), LIMIT));
    stage.edit(|config| config["process"]["args"][4] = json!("24577"));
    let output = run(&stage, &[]);
    assert_eq!((output.status.code(), written(&output)), (Some(137), LIMIT));
}
