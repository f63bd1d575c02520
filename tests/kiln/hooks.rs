//! Hooks of the host: in the caller's namespaces, in order, with the container's state; their
//! failures.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::lifecycle::{create, kiln, succeeds};
use crate::run::{eventually, processes_of};
use crate::stage::{Stage, errors};

/// A hook that notes its name, and, in a file of that name, the state that it gets.
fn noting(stage: &Stage, name: &str) -> Value {
    let log = stage.path().join("log").display().to_string();
    let script = "echo $NAME >> $LOG; cat > $LOG.$NAME; readlink /proc/self/ns/net > $LOG.$NAME.ns";
    json!({
        "path": "/bin/sh", "args": ["sh", "-c", script],
        "env": [format!("NAME={name}"), format!("LOG={log}"), "PATH=/usr/bin:/bin"],
    })
}

fn failing(message: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", format!("echo {message} >&2; exit 9")]})
}

fn log(stage: &Stage) -> String {
    fs::read_to_string(stage.path().join("log")).unwrap_or_default()
}

fn noted(stage: &Stage, name: &str) -> Value {
    let text = fs::read(stage.path().join(format!("log.{name}"))).expect("noted");
    serde_json::from_slice(&text).expect("JSON")
}

fn set_hooks(stage: &Stage, hooks: Value) {
    stage.edit(|config| {
        config["hooks"] = hooks;
        config["annotations"] = json!({"a": "b"});
        config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "network"}]);
    });
}

#[test]
fn hooks_run_in_order_with_the_containers_state() {
    let stage = Stage::new(&["sleep", "1000"]);
    let note = |name| noting(&stage, name);
    set_hooks(
        &stage,
        json!({
            "prestart": [note("1"), note("2")], "createRuntime": [note("3")],
            "poststart": [note("4")], "poststop": [failing("late"), note("5")],
        }),
    );
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(log(&stage), "1\n2\n3\n");
    let pid = stage.state()["pid"].clone();
    for name in ["1", "2", "3"] {
        let state = noted(&stage, name);
        assert_eq!(state["id"], "test");
        assert_eq!(state["status"], "creating");
        assert_eq!(state["pid"], pid);
        assert_eq!(state["ociVersion"], "1.0.2");
        assert_eq!(state["bundle"], stage.bundle().display().to_string());
        assert_eq!(state["annotations"], json!({"a": "b"}));
        let namespace = fs::read_link("/proc/self/ns/net").expect("own");
        let theirs = fs::read_to_string(stage.path().join(format!("log.{name}.ns"))).expect("ns");
        assert_eq!(theirs.trim(), namespace.display().to_string());
    }
    succeeds(&stage, &["start", "test"]);
    assert_eq!(log(&stage), "1\n2\n3\n4\n");
    assert_eq!(
        (&noted(&stage, "4")["status"], &noted(&stage, "4")["pid"]),
        (&json!("running"), &pid)
    );

    let output = kiln(&stage, &["delete", "--force", "test"]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(log(&stage), "1\n2\n3\n4\n5\n");
    let state = noted(&stage, "5");
    assert_eq!((&state["status"], &state["pid"]), (&json!("stopped"), &Value::Null));
    assert!(stage.is_clean());
}

#[test]
fn failure_before_the_start_undoes_the_create() {
    let stage = Stage::new(&["sleep", "1000"]);
    for field in ["prestart", "createRuntime"] {
        let poststop = noting(&stage, field);
        set_hooks(&stage, json!({field: [failing("because")], "poststop": [poststop]}));
        let output = create(&stage, &[]);
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        assert!(errors.contains(&format!("hooks.{field}[0]")), "{errors}");
        assert!(errors.contains("exited with status 9") && errors.contains("because"), "{errors}");
        assert!(stage.is_clean());
        assert!(log(&stage).ends_with(&format!("{field}\n")));
    }
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn hook_that_is_missing_or_takes_too_long_undoes_the_create() {
    let stage = Stage::new(&["sleep", "1000"]);
    for (hook, word) in [
        (json!({"path": "/no/such/hook"}), "/no/such/hook"),
        (json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}), "timeout of 1 s"),
    ] {
        set_hooks(&stage, json!({"createRuntime": [hook]}));
        let output = create(&stage, &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains(word), "{}", errors(&output));
        assert!(stage.is_clean());
    }
}

#[test]
fn failure_after_the_start_stops_the_container() {
    let stage = Stage::new(&["sleep", "1000"]);
    let poststop = noting(&stage, "stopped");
    set_hooks(&stage, json!({"poststart": [failing("because")], "poststop": [poststop]}));
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let output = kiln(&stage, &["start", "test"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("hooks.poststart[0]"), "{}", errors(&output));
    assert_eq!(stage.state()["status"], "stopped");
    succeeds(&stage, &["delete", "test"]);
    assert_eq!(log(&stage), "stopped\n");

    let output = stage.run(&[]).output().expect("kiln");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("hooks.poststart[0]"), "{}", errors(&output));
    assert_eq!(log(&stage), "stopped\nstopped\n");
    assert!(stage.is_clean());

    let pid_file = stage.path().join("pid");
    let options = ["--detach", "--pid-file", pid_file.to_str().expect("text")];
    let mut command = stage.run(&options);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    assert_eq!(command.status().expect("kiln").code(), Some(1));
    assert_eq!(log(&stage), "stopped\nstopped\nstopped\n");
    assert!(stage.is_clean());
}

#[test]
fn hooks_of_the_container_run_in_the_guest_with_the_containers_state() {
    let stage = Stage::new(&["sh", "-c", "echo program >> /order"]);
    let hook = |name: &str| {
        let script = format!("cat > /{name}; echo {name} >> /order");
        json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"]})
    };
    set_hooks(
        &stage,
        json!({"createContainer": [hook("create")], "startContainer": [hook("start")]}),
    );
    let inside = |name: &str| fs::read_to_string(stage.rootfs().join(name)).unwrap_or_default();
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(inside("order"), "create\n");
    succeeds(&stage, &["start", "test"]);
    eventually("the program", || inside("order") == "create\nstart\nprogram\n");
    for (name, status) in [("create", "creating"), ("start", "created")] {
        let state: Value = serde_json::from_str(&inside(name)).expect("JSON");
        let expected = json!({
            "ociVersion": "1.0.2", "id": "test", "status": status, "pid": 1,
            "bundle": stage.bundle().display().to_string(), "annotations": {"a": "b"},
        });
        assert_eq!(state, expected);
    }
    succeeds(&stage, &["delete", "--force", "test"]);

    for (field, hook, word) in [
        ("createContainer", failing("because"), "exit status: 9; its output ends with: because"),
        ("createContainer", json!({"path": "/usr/bin/env"}), "files of the host are not"),
        ("startContainer", failing("because"), "exit status: 9; its output ends with: because"),
    ] {
        set_hooks(&stage, json!({field: [hook]}));
        let output = stage.run(&[]).output().expect("kiln");
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        assert!(errors.contains(&format!("hooks.{field}[0]")) && errors.contains(word), "{errors}");
        assert!(stage.is_clean());
    }
}

#[test]
fn second_start_is_refused_while_the_first_is_under_way() {
    let stage = Stage::new(&["sleep", "1000"]);
    let script = "echo > /begun; until [ -e /go ]; do sleep 0.1; done";
    let hook = json!({
        "path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"],
    });
    set_hooks(&stage, json!({"startContainer": [hook]}));
    let (begun, go) = (stage.rootfs().join("begun"), stage.rootfs().join("go"));
    let crossed_by_a_start = |mut first: Command| {
        let mut first = first.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("kiln");
        eventually("the hook", || begun.exists());
        let output = kiln(&stage, &["start", "test"]);
        assert_eq!(output.status.code(), Some(1));
        let errors = errors(&output);
        assert!(errors.contains("cannot start an already running container"), "{errors}");
        assert!(first.try_wait().expect("a child").is_none());
        fs::write(&go, "").expect("written");
        assert!(first.wait().expect("ends").success());
        assert_eq!(stage.state()["status"], "running");
        succeeds(&stage, &["delete", "--force", "test"]);
        fs::remove_file(&begun).expect("there");
        fs::remove_file(&go).expect("there");
    };
    let output = create(&stage, &[]);
    assert!(output.status.success(), "{}", errors(&output));
    let mut start = stage.kiln();
    start.args(["start", "test"]);
    crossed_by_a_start(start);
    crossed_by_a_start(stage.run(&["--detach"]));
}
