//! Where the time went: traces, and phases in the log.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::exec::{exec, said};
use crate::lifecycle::{succeeds, wait_for};
use crate::stage::{Stage, errors};

/// A complete event of a trace.
#[derive(Debug)]
struct Span {
    name: String,
    row: (u64, u64),
    begun: f64,
    ended: f64,
}

/// The trace's spans; it must be whole.
fn spans(path: &Path) -> Vec<Span> {
    let trace: Value = serde_json::from_slice(&fs::read(path).expect("trace")).expect("JSON");
    let mut spans = Vec::new();
    for event in trace["traceEvents"].as_array().expect("a list") {
        let number = |field: &str| event[field].as_u64().unwrap_or_else(|| panic!("{event}"));
        let row = (number("pid"), number("tid"));
        let name = event["name"].as_str().expect("a name").to_owned();
        match event["ph"].as_str() {
            Some("M") => assert!(event["args"]["name"].is_string(), "{event}"),
            Some("X") => {
                let time = |field: &str| event[field].as_f64().expect("a time");
                let (begun, took) = (time("ts"), time("dur"));
                assert!(begun > 0.0 && took >= 0.0, "{event}");
                spans.push(Span { name, row, begun, ended: begun + took });
            }
            _ => panic!("{event}"),
        }
    }
    spans
}

/// Times are rounded to their millionth part of a second's.
const ROUNDING: f64 = 0.01;

fn find<'a>(spans: &'a [Span], name: &str) -> &'a Span {
    spans.iter().find(|span| span.name == name).unwrap_or_else(|| panic!("{name}: {spans:#?}"))
}

#[test]
fn trace_and_log_have_every_phase_of_a_life() {
    let stage = Stage::new(&["true"]);
    let (trace, log) = (stage.path().join("trace.json"), stage.path().join("log.json"));
    let mut command = stage.kiln();
    command.arg("--log").arg(&log).args(["--log-format", "json"]);
    command.args(["run", "--engine", "emulated", "--trace"]).arg(&trace);
    command.arg("--bundle").arg(stage.bundle()).arg("test");
    let output = command.stdin(Stdio::null()).output().expect("kiln");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));

    let spans = spans(&trace);
    let sandbox = find(&spans, "sandbox");
    let names = ["host set-up", "boot", "container set-up", "container start", "step", "teardown"];
    let mut at = sandbox.begun;
    for name in names {
        let phase = find(&spans, name);
        assert_eq!(phase.row, sandbox.row);
        assert!((phase.begun - at).abs() < ROUNDING, "{name} begins {} after", phase.begun - at);
        at = phase.ended;
    }
    assert!((sandbox.ended - at).abs() < ROUNDING);
    for (name, phase) in [
        ("cgroup and namespaces", "host set-up"),
        ("initial RAM disk", "host set-up"),
        ("start of the machine", "host set-up"),
        ("guest's kernel", "boot"),
        ("agent's greeting", "boot"),
        ("end of the guest", "teardown"),
    ] {
        let (span, phase) = (find(&spans, name), find(&spans, phase));
        assert!(span.begun >= phase.begun && span.ended <= phase.ended, "{span:?} {phase:?}");
    }
    for name in ["file system process", "device process", "QEMU"] {
        let process = find(&spans, name);
        assert_ne!(process.row.0, sandbox.row.0);
        assert!(process.begun > sandbox.begun && process.ended < sandbox.ended + ROUNDING);
    }
    assert!(find(&spans, "bundle").ended <= find(&spans, "start of the machine").begun);
    // On one row, spans follow each other or are one within the other.
    for one in &spans {
        for other in spans.iter().filter(|other| other.row == one.row) {
            let apart = one.ended <= other.begun + ROUNDING || other.ended <= one.begun + ROUNDING;
            let within =
                |a: &Span, b: &Span| a.begun >= b.begun - ROUNDING && a.ended <= b.ended + ROUNDING;
            assert!(apart || within(one, other) || within(other, one), "{one:?} {other:?}");
        }
    }

    let text = fs::read_to_string(&log).expect("log");
    let lines: Vec<Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    assert!(lines.iter().all(|line| line["level"] != "error"), "{text}");
    let phases: Vec<_> = lines.iter().filter(|line| line["msg"] == "phase has ended").collect();
    let logged: Vec<_> = phases.iter().map(|line| line["phase"].as_str().expect("text")).collect();
    assert_eq!(logged, names);
    for line in phases {
        assert_eq!((&line["id"], &line["level"]), (&json!("test"), &json!("info")));
        let span = find(&spans, line["phase"].as_str().expect("text"));
        let milliseconds = line["duration_ms"].as_f64().expect("a number");
        assert!((milliseconds - (span.ended - span.begun) / 1e3).abs() < ROUNDING, "{line}");
        assert!(line["start"].as_str().is_some_and(|start| start.ends_with('Z')), "{line}");
    }
}

#[test]
fn trace_is_whole_after_a_sudden_end() {
    let stage = Stage::new(&["sh", "-c", "sleep 1000"]);
    let trace = stage.path().join("trace.json");
    fs::write(&trace, "what was there before, which is longer than what comes first")
        .expect("file");
    let mut run = stage.kiln();
    run.args(["run", "--detach", "--engine", "emulated", "--trace"]).arg(&trace);
    run.arg("--bundle").arg(stage.bundle()).arg("test");
    let null = Stdio::null;
    assert!(run.stdin(null()).stdout(null()).stderr(null()).status().expect("kiln").success());
    said(&stage, &[], &["true"]);
    let mut unknown = exec(&stage, &[], &["no-such-program"]);
    assert_eq!(unknown.output().expect("kiln").status.code(), Some(127));
    let pid = stage.state()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("pid");
    kill(Pid::from_raw(pid), Signal::SIGKILL).expect("killed");
    wait_for(&stage, "stopped");

    let spans = spans(&trace);
    assert!(spans.iter().all(|span| span.name != "sandbox" && span.name != "step"));
    find(&spans, "container start");
    let execs: Vec<_> = spans.iter().filter(|span| span.name == "exec").collect();
    assert_eq!(execs.len(), 2);
    assert_ne!(execs[0].row, execs[1].row);
    let programs: Vec<_> = spans.iter().filter(|span| span.name == "program").collect();
    assert_eq!(programs.len(), 1);
    let around = execs.iter().find(|exec| exec.row == programs[0].row).expect("its exec");
    assert!(programs[0].begun >= around.begun && programs[0].ended <= around.ended + ROUNDING);
    succeeds(&stage, &["delete", "--force", "test"]);
}

#[test]
fn trace_that_can_not_be_written_is_refused_before_anything_is_done() {
    let stage = Stage::new(&["true"]);
    for path in ["/no/such/folder/trace", "/dev/null"] {
        let output = stage.run(&["--trace", path]).output().expect("kiln");
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains(&format!("--trace {path}: ")), "{}", errors(&output));
        assert!(stage.is_clean());
    }
}
