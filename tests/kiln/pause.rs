//! `kiln pause`, `resume` and `ps`.

use std::fs;
use std::process::Stdio;

use serde_json::{Value, json};

use crate::exec::{exec, running, said, start};
use crate::lifecycle::{create, kiln, succeeds, wait_for};
use crate::run::eventually;
use crate::stage::{Stage, errors};

fn refused(stage: &Stage, args: &[&str], expected: &str) {
    let output = kiln(stage, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    assert!(errors(&output).contains(expected), "{args:?}: {}", errors(&output));
}

/// How many bytes a file of the container has.
fn length(stage: &Stage, name: &str) -> u64 {
    fs::metadata(stage.rootfs().join(name)).map_or(0, |metadata| metadata.len())
}

#[test]
fn paused_containers_stand_still_until_resumed_or_killed() {
    let stage = running(&["sh", "-c", "while :; do echo >>/ticks; sleep 0.05; done"]);
    eventually("a tick", || length(&stage, "ticks") > 0);
    refused(&stage, &["resume", "test"], "container not paused");
    succeeds(&stage, &["pause", "test"]);
    assert_eq!(stage.state()["status"], "paused");
    assert!(succeeds(&stage, &["list"]).contains("paused"));
    let paused_at = length(&stage, "ticks");
    refused(&stage, &["pause", "test"], "container not running");
    refused(&stage, &["start", "test"], "cannot start a container in the paused state");
    refused(&stage, &["delete", "test"], "not stopped: paused");

    // A program may be executed in it only if that is asked for, and then waits.
    let output = exec(&stage, &[], &["true"]).output().expect("kiln");
    assert_eq!(output.status.code(), Some(255));
    let expected = "cannot exec in a paused container (use --ignore-paused to override)";
    assert!(errors(&output).contains(expected), "{}", errors(&output));
    let mut waiting = exec(&stage, &["--ignore-paused"], &["sh", "-c", "echo done"]);
    let waiting = waiting.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kiln");
    assert!(succeeds(&stage, &["ps", "test"]).contains("/ticks"));
    assert_eq!(length(&stage, "ticks"), paused_at);

    succeeds(&stage, &["resume", "test"]);
    assert_eq!(stage.state()["status"], "running");
    let output = waiting.wait_with_output().expect("ends");
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(0), &b"done\n"[..]));
    eventually("a tick", || length(&stage, "ticks") > paused_at);

    succeeds(&stage, &["pause", "test"]);
    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    refused(&stage, &["pause", "test"], "container not running");
    refused(&stage, &["ps", "test"], "container not running");
    succeeds(&stage, &["delete", "test"]);
    refused(&stage, &["pause", "test"], "does not exist");
    assert!(stage.is_clean());
}

#[test]
fn created_container_is_paused_and_created_again() {
    let stage = Stage::new(&["sh", "-c", "echo begun"]);
    assert!(create(&stage, &[]).status.success());
    succeeds(&stage, &["pause", "test"]);
    assert_eq!(stage.state()["status"], "paused");
    refused(&stage, &["start", "test"], "cannot start a container in the paused state");
    succeeds(&stage, &["resume", "test"]);
    assert_eq!(stage.state()["status"], "created");
    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    assert_eq!(fs::read_to_string(stage.path().join("output")).expect("output"), "begun\n");
    succeeds(&stage, &["delete", "test"]);
}

#[test]
fn processes_are_the_guests_in_tables_and_the_hosts_for_programs() {
    let stage = Stage::new(&["sleep", "1000"]);
    start(&stage);
    let pid_file = stage.path().join("exec.pid");
    let options = ["--pid-file", pid_file.to_str().expect("text"), "-u", "12"];
    let mut child = exec(&stage, &options, &["sleep", "2000"]).stdin(Stdio::null()).spawn();
    let child = child.as_mut().expect("kiln");
    eventually("the pid file", || pid_file.exists());
    let proxy: i64 = fs::read_to_string(pid_file).expect("pid file").parse().expect("a number");

    let table = succeeds(&stage, &["ps", "test"]);
    let rows: Vec<Vec<&str>> =
        table.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["UID", "PID", "PPID", "TIME", "CMD"]);
    let of =
        |uid, argument| rows.iter().any(|row| row[0] == uid && row[4..] == ["sleep", argument]);
    assert!(of("0", "1000") && of("12", "2000") && rows.len() == 3, "{table}");
    assert_eq!(succeeds(&stage, &["ps", "test", "-ef"]), table);
    refused(&stage, &["ps", "test", "-aux"], "ps option \"-aux\": ");

    let json: Value =
        serde_json::from_str(&succeeds(&stage, &["ps", "--format", "json", "test"])).expect("JSON");
    assert_eq!(json, json!([stage.state()["pid"], proxy]));
    child.kill().expect("killed");
    child.wait().expect("ends");
    let alone = || {
        let list = succeeds(&stage, &["ps", "-f", "json", "test"]);
        serde_json::from_str::<Vec<i64>>(&list).expect("JSON").len() == 1
    };
    eventually("the exec's end", alone);
    assert_eq!(said(&stage, &[], &["sh", "-c", "echo still there"]), "still there\n");
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}
