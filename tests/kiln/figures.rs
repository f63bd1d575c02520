//! `kiln events` and `kiln update`: a container's figures, its limits, and what happens at them.

use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use serde_json::{Value, json};

use crate::exec::{exec, said, start};
use crate::lifecycle::{kiln, succeeds, wait_for};
use crate::run::eventually;
use crate::stage::{Stage, errors};

/// The data of `events --stats`.
fn stats(stage: &Stage) -> Value {
    let line = succeeds(stage, &["events", "--stats", "test"]);
    assert_eq!(line.lines().count(), 1, "{line}");
    let event: Value = serde_json::from_str(&line).expect("JSON");
    assert_eq!((&event["type"], &event["id"]), (&json!("stats"), &json!("test")));
    event["data"].clone()
}

/// `kiln update --resources -` with this on standard input.
fn update(stage: &Stage, resources: &str) -> std::process::Output {
    let mut command = stage.kiln();
    command.args(["update", "--resources", "-", "test"]).stdin(Stdio::piped());
    let mut child = command.stderr(Stdio::piped()).spawn().expect("kiln");
    child.stdin.take().expect("a pipe").write_all(resources.as_bytes()).expect("written");
    child.wait_with_output().expect("ends")
}

fn refused(stage: &Stage, args: &[&str], expected: &str) {
    let output = kiln(stage, args);
    assert_eq!(output.status.code(), Some(1), "{args:?}");
    assert!(errors(&output).contains(expected), "{args:?}: {}", errors(&output));
}

#[test]
fn figures_are_told_limits_are_changed_and_kept() {
    // A shell reaps what others leave behind; as long as nobody does, it counts as a process.
    let stage = Stage::new(&["sh", "-c", "sleep 1000; :"]);
    stage.edit(|config| {
        config["linux"]["resources"] =
            json!({"memory": {"limit": 64 << 20}, "pids": {"limit": 40}});
    });
    start(&stage);

    eventually("both of its processes", || stats(&stage)["pids"]["current"] == 2);
    let first = stats(&stage);
    assert_eq!(first["memory"]["usage"]["limit"], 64 << 20);
    assert_eq!(first["pids"]["limit"], 40);
    let number = |data: &Value, pointer: &str| {
        data.pointer(pointer).and_then(Value::as_u64).unwrap_or_else(|| panic!("{pointer}: {data}"))
    };
    assert!(number(&first, "/memory/usage/usage") > 0);
    assert!(number(&first, "/memory/raw/anon") > 0);
    assert_eq!(first["memory"]["cache"].as_u64().unwrap_or(0), number(&first, "/memory/raw/file"));
    said(&stage, &[], &["sh", "-c", "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done"]);
    let second = stats(&stage);
    let total = |data| number(data, "/cpu/usage/total");
    assert!(total(&second) > total(&first), "{first} {second}");

    // By options and by a document, what is not named staying as it is.
    succeeds(&stage, &["update", "--memory", "96m", "--pids-limit", "30", "test"]);
    let limits = |data: &Value| {
        (number(data, "/memory/usage/limit"), data["pids"]["limit"].as_u64().unwrap_or(0))
    };
    assert_eq!(limits(&stats(&stage)), (96 << 20, 30));
    let output = update(&stage, r#"{"pids": {"limit": 5}, "cpu": {"quota": 10000, "shares": 0}}"#);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(limits(&stats(&stage)), (96 << 20, 5));
    let script = "for i in 1 2 3 4 5 6; do sleep 3 >/dev/null 2>&1 & done";
    let output = exec(&stage, &[], &["sh", "-c", script]).output().expect("kiln");
    assert!(errors(&output).contains("fork"), "{}", errors(&output));
    eventually("their end", || stats(&stage)["pids"]["current"] == 2);
    said(&stage, &[], &["sh", "-c", "i=0; while [ $i -lt 9999 ]; do i=$((i+1)); done"]);
    assert!(number(&stats(&stage), "/cpu/throttling/throttledPeriods") > 0);
    succeeds(&stage, &["update", "--cpu-quota", "-1", "--pids-limit", "-1", "test"]);
    let unlimited = limits(&stats(&stage));
    // As many as the guest's kernel has room for.
    assert!(unlimited.0 == 96 << 20 && unlimited.1 > 100, "{unlimited:?}");

    // What can't be is refused, and then nothing is changed.
    refused(&stage, &["update", "--memory", "8g", "test"], "more than the guest's memory of");
    refused(&stage, &["update", "--memory", "much", "test"], "\"much\" is no size");
    refused(&stage, &["update", "--cpu-rt-period", "1", "test"], "no real-time limits");
    refused(&stage, &["update", "--l3-cache-schema", "x", "test"], "--l3-cache-schema=x: ");
    for (resources, expected) in [
        ("{\n\"pids\": }", "-: expected value at line 2 column 9"),
        (r#"{"pids": {"limits": 1}}"#, "linux.resources.pids.limits: not supported"),
        (r#"{"pids": {"limit": 7}, "cpu": {"cpus": "x"}}"#, "linux.resources.cpu.cpus: "),
    ] {
        let output = update(&stage, resources);
        assert_eq!(output.status.code(), Some(1), "{resources}");
        assert!(errors(&output).contains(expected), "{resources}: {}", errors(&output));
    }
    assert_eq!(limits(&stats(&stage)), unlimited);
    refused(&stage, &["events", "--interval", "0s", "test"], "must be greater than 0");

    // Whoever watches hears of memory that runs out, and then of the container's end.
    let mut watching = stage.kiln();
    watching.args(["events", "--interval", "100ms", "test"]).stdout(Stdio::piped());
    let mut watching = watching.spawn().expect("kiln");
    let mut lines = BufReader::new(watching.stdout.take().expect("a pipe")).lines();
    let mut next = move || -> Option<Value> {
        lines.next().map(|line| serde_json::from_str(&line.expect("text")).expect("JSON"))
    };
    assert_eq!(next().expect("an event")["type"], "stats");
    let mut hog = exec(&stage, &[], &["dd", "if=/dev/zero", "of=/dev/null", "bs=112M", "count=1"]);
    assert_eq!(hog.output().expect("kiln").status.code(), Some(137));
    let oom = std::iter::from_fn(&mut next).find(|event| event["type"] == "oom");
    assert_eq!(oom, Some(json!({"type": "oom", "id": "test"})));
    let is_counted = || stage.state()["annotations"]["io.kiln.oom-killed"] == "1";
    eventually("the count", is_counted);
    assert_eq!(stats(&stage)["memory"]["event_count"]["oom_kill"], 1);

    succeeds(&stage, &["kill", "test", "KILL"]);
    assert!(std::iter::from_fn(&mut next).all(|event| event["type"] == "stats"));
    assert!(watching.wait().expect("ends").success());
    wait_for(&stage, "stopped");
    assert!(is_counted());
    refused(&stage, &["events", "test"], "container with id test is not running");
    refused(&stage, &["update", "--memory", "1m", "test"], "container not running");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}
