//! What `kiln exec` writes counts against the container's limit of output.

use std::fs::File;
use std::process::{Output, Stdio};

use crate::lifecycle::{create, kiln, succeeds, wait_for};
use crate::stage::{Stage, errors, eventually, processes_of};

const WORDS: &str = "the step wrote more than its output limit of 64 KiB, and it was ended";

/// A container that waits, and may write 64 KiB.
fn started() -> Stage {
    let stage = Stage::new(&["sleep", "1000"]);
    let created = create(&stage, &["--output-limit", "64K"]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);
    stage
}

fn write(stage: &Stage, bytes: usize) -> Output {
    kiln(stage, &["exec", "test", "head", "-c", &bytes.to_string(), "/dev/zero"])
}

/// The container has been ended, and its state says why.
fn is_over(stage: &Stage) {
    wait_for(stage, "stopped");
    assert_eq!(stage.state()["annotations"]["io.kiln.limit-reached"], "output-limit");
    succeeds(stage, &["delete", "test"]);
    eventually("the end of every process", || processes_of(stage).is_empty());
    assert!(stage.is_clean());
}

#[test]
fn execs_have_one_limit_with_the_step_and_with_each_other() {
    let stage = started();
    for _ in 0..2 {
        let output = write(&stage, 20 << 10);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(0), 20 << 10));
    }
    let output = write(&stage, 25 << 10);
    assert_eq!(output.status.code(), Some(137), "{}", errors(&output));
    assert_eq!(output.stdout.len(), 24 << 10);
    let errors = errors(&output);
    assert!(errors.contains(WORDS) && errors.contains("raise --output-limit"), "{errors}");
    is_over(&stage);
}

#[test]
fn a_detached_exec_without_end_ends_with_its_container_and_others_are_told() {
    let stage = started();
    let mut waits = stage.kiln();
    waits.args(["exec", "test", "sh", "-c", "echo waits; sleep 1000"]);
    waits.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut waits = waits.spawn().expect("kiln");
    crate::run::wait_for_line(&mut waits, "waits");
    let path = stage.path().join("much");
    let mut command = stage.kiln();
    command.args(["exec", "--detach", "test", "yes"]).stdin(Stdio::null());
    command.stdout(File::create(&path).expect("a file")).stderr(Stdio::null());
    assert!(command.status().expect("kiln").success());
    let output = waits.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(137), "{}", errors(&output));
    assert!(errors(&output).contains(WORDS), "{}", errors(&output));
    let written = std::fs::metadata(&path).expect("written").len();
    assert_eq!(written, (64 << 10) - "waits\n".len() as u64);
    is_over(&stage);
}
