//! `kiln metrics`: the figures of all sandboxes, whether they answer or not.

use std::collections::BTreeMap;
use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::exec::running;
use crate::lifecycle::{succeeds, wait_for};
use crate::run::eventually;
use crate::stage::Stage;

/// A sample of the exposition.
#[derive(Debug)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Parses the text format line by line, and checks that it is such.
fn parse(text: &str) -> Vec<Sample> {
    let mut samples = Vec::new();
    let mut families: Vec<&str> = Vec::new();
    assert!(text.ends_with('\n'));
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (family, help) = help.split_once(' ').expect("a text");
            assert!(!families.contains(&family), "{family} is there twice");
            assert!(!help.is_empty());
            families.push(family);
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (family, kind) = kind.split_once(' ').expect("a type");
            assert_eq!(families.last(), Some(&family));
            assert!(["counter", "gauge"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", family.ends_with("_total"), "{line}");
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let (name, labels) = match series.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}').expect("a brace")),
                None => (series, ""),
            };
            assert_eq!(families.last(), Some(&name), "{line}");
            // No value of a test's has a comma in it.
            let labels = labels.split(',').filter(|label| !label.is_empty()).map(|label| {
                let (name, value) = label.split_once('=').expect("a label");
                let value = value.strip_prefix('"').and_then(|value| value.strip_suffix('"'));
                (name.to_owned(), value.expect("quotes").to_owned())
            });
            let (name, labels) = (name.to_owned(), labels.collect());
            samples.push(Sample { name, labels, value: value.parse().expect("a number") });
        }
    }
    samples
}

fn metrics(stage: &Stage) -> Vec<Sample> {
    parse(&succeeds(stage, &["metrics"]))
}

/// The metrics once the container `test` answers, which on a loaded machine it may not do in time.
fn metrics_once_up(stage: &Stage) -> Vec<Sample> {
    let mut samples = Vec::new();
    eventually("an answer", || {
        samples = metrics(stage);
        values(&samples, "kiln_container_up", &[("id", "test")]) == [1.0]
    });
    samples
}

/// The values of a metric whose labels have these among them.
fn values(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> Vec<f64> {
    let has = |sample: &&Sample| {
        sample.name == name
            && labels
                .iter()
                .all(|(name, value)| sample.labels.get(*name).is_some_and(|label| label == value))
    };
    samples.iter().filter(has).map(|sample| sample.value).collect()
}

/// The process of a role.
fn pid_of(samples: &[Sample], role: &str) -> Pid {
    let is_it = |sample: &&Sample| {
        let labels = &sample.labels;
        let is_process = sample.name == "kiln_process_cpu_seconds_total";
        is_process && labels["id"] == "test" && labels["role"] == role
    };
    let sample = samples.iter().find(is_it).unwrap_or_else(|| panic!("no {role}"));
    Pid::from_raw(sample.labels["pid"].parse().expect("a number"))
}

#[test]
fn metrics_are_of_all_sandboxes_whether_they_answer_or_not() {
    let stage = running(&["sh", "-c", "sleep 1000; :"]);
    // A second one, whose monitor is this process, which never answers.
    let mut state: Value =
        serde_json::from_slice(&fs::read(stage.root().join("test/state.json")).expect("state"))
            .expect("JSON");
    let stat = fs::read_to_string("/proc/self/stat").expect("stat");
    let started = stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(19));
    let started: u64 = started.and_then(|ticks| ticks.parse().ok()).expect("a time");
    state["id"] = json!("deaf");
    state["monitor"] = json!({"pid": std::process::id(), "started": started});
    state["cgroup"] = json!({"directories": [], "unit": null});
    fs::create_dir(stage.root().join("deaf")).expect("made");
    fs::write(stage.root().join("deaf/state.json"), state.to_string()).expect("written");

    let samples = metrics_once_up(&stage);
    let test = ("id", "test");
    let one = |name: &str, labels: &[(&str, &str)]| {
        let found = values(&samples, name, labels);
        assert_eq!(found.len(), 1, "{name} {labels:?}: {samples:#?}");
        found[0]
    };
    assert_eq!(one("kiln_containers", &[("status", "running")]), 2.0);
    assert_eq!(one("kiln_containers", &[("status", "stopped")]), 0.0);
    assert_eq!(one("kiln_container_up", &[test, ("engine", "emulated")]), 1.0);
    assert_eq!(one("kiln_container_up", &[("id", "deaf")]), 0.0);
    assert_eq!(one("kiln_container_info", &[test, ("status", "running")]), 1.0);
    assert!(one("kiln_container_uptime_seconds", &[test]) > 0.0);
    for phase in ["host set-up", "boot", "container set-up", "wait for start", "container start"] {
        assert!(one("kiln_container_phase_seconds", &[test, ("phase", phase)]) > 0.0, "{phase}");
    }
    assert!(one("kiln_container_memory_bytes", &[test]) > 0.0);
    assert!(one("kiln_container_processes", &[test]) >= 1.0);
    assert!(one("kiln_container_cpu_seconds_total", &[test, ("mode", "system")]) > 0.0);
    for role in ["monitor", "fs", "devices", "qemu"] {
        assert!(one("kiln_process_memory_bytes", &[test, ("role", role)]) > 0.0, "{role}");
        assert!(one("kiln_process_cpu_seconds_total", &[test, ("role", role)]) >= 0.0);
    }
    assert_eq!(pid_of(&samples, "monitor").as_raw().to_string(), stage.state()["pid"].to_string());

    // A guest that hangs, and a monitor that does.
    for (role, phases) in [("qemu", 5), ("monitor", 0)] {
        let process = pid_of(&samples, role);
        kill(process, Signal::SIGSTOP).expect("stopped");
        let samples = metrics(&stage);
        kill(process, Signal::SIGCONT).expect("goes on");
        assert_eq!(values(&samples, "kiln_container_up", &[test]), [0.0], "{role}");
        assert!(values(&samples, "kiln_container_memory_bytes", &[test]).is_empty());
        assert_eq!(values(&samples, "kiln_container_phase_seconds", &[test]).len(), phases);
        assert_eq!(values(&samples, "kiln_process_memory_bytes", &[test]).len(), 4, "{role}");
    }
    metrics_once_up(&stage);

    fs::remove_dir_all(stage.root().join("deaf")).expect("removed");
    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    let samples = metrics(&stage);
    assert_eq!(values(&samples, "kiln_containers", &[("status", "stopped")]), [1.0]);
    assert!(values(&samples, "kiln_container_up", &[]).is_empty());
    assert!(!values(&samples, "kiln_container_phase_seconds", &[("phase", "step")]).is_empty());
    succeeds(&stage, &["delete", "test"]);
    let samples = metrics(&stage);
    assert!(samples.iter().all(|sample| !sample.labels.contains_key("id")), "{samples:?}");
    assert_eq!(values(&samples, "kiln_containers", &[]), [0.0; 5]);
}
