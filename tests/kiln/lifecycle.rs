//! Containers that outlive the command that made them: create, start, state, kill, delete, list.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::run::{eventually, processes_of};
use crate::stage::{Stage, errors};
pub use crate::stage::{create, kiln, succeeds, wait_for, wait_for_output};

#[test]
fn container_is_created_started_and_deleted() {
    let stage = Stage::new(&["sh", "-c", "echo begun; exit 7"]);
    let pid_file = stage.path().join("pid");
    let output = create(&stage, &["--pid-file", &pid_file.display().to_string()]);
    assert!(output.status.success(), "{}", errors(&output));

    let created = stage.state();
    assert_eq!(created["status"], "created");
    assert_eq!(created["id"], "test");
    assert_eq!(created["bundle"], stage.bundle().display().to_string());
    let pid = fs::read_to_string(pid_file).expect("pid file");
    assert_eq!(created["pid"].to_string(), pid);
    assert!(fs::exists(format!("/proc/{pid}")).expect("proc"));
    assert_eq!(fs::read_to_string(stage.path().join("output")).expect("output"), "");
    assert!(succeeds(&stage, &["list"]).contains("created"));

    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    assert_eq!(fs::read_to_string(stage.path().join("output")).expect("output"), "begun\n");
    assert_eq!(stage.state()["pid"], 0);

    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
    let output = kiln(&stage, &["state", "test"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("container does not exist: \"test\""), "{}", errors(&output));
}

#[test]
fn verbs_refuse_what_the_state_does_not_allow() {
    let stage = Stage::new(&["sh", "-c", "echo up; sleep 1000"]);
    assert!(create(&stage, &[]).status.success());
    let refused = |args: &[&str], expected: &str| {
        let output = kiln(&stage, args);
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        assert!(errors(&output).contains(expected), "{args:?}: {}", errors(&output));
    };
    let bundle = stage.bundle().display().to_string();
    refused(
        &["create", "--engine", "emulated", "--bundle", &bundle, "test"],
        "container with given ID already exists",
    );
    succeeds(&stage, &["start", "test"]);
    refused(&["start", "test"], "cannot start an already running container");
    refused(&["delete", "test"], "not stopped: running");
    refused(&["kill", "nosuch"], "does not exist");
    let unknown = kiln(&stage, &["kill", "test", "NOSUCH"]);
    assert!(!unknown.status.success());
    assert!(errors(&unknown).contains("unknown signal"), "{}", errors(&unknown));

    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    refused(&["start", "test"], "has stopped");
    refused(&["kill", "test"], "container not running");
    refused(
        &["create", "--engine", "emulated", "--bundle", &bundle, "test"],
        "container with given ID already exists",
    );
    succeeds(&stage, &["delete", "test"]);
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn signals_reach_the_program_and_its_status_is_the_monitors() {
    let program = "trap 'echo got it; exit 5' TERM; echo up; while :; do sleep 1; done";
    let stage = Stage::new(&["sh", "-c", program]);
    // This process becomes the one that the monitor is left to.
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
    assert!(create(&stage, &[]).status.success());
    let pid = i32::try_from(stage.state()["pid"].as_i64().expect("number")).expect("pid");
    succeeds(&stage, &["start", "test"]);
    wait_for_output(&stage, "up");
    succeeds(&stage, &["kill", "test", "SIGTERM"]);
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    assert_eq!(unsafe { libc::waitpid(pid, &raw mut status, 0) }, pid);
    assert_eq!(libc::WEXITSTATUS(status), 5);
    wait_for_output(&stage, "got it");
    succeeds(&stage, &["delete", "test"]);
}

#[test]
fn files_that_are_written_before_the_start_are_seen_by_the_program() {
    let stage = Stage::new(&["cat", "/resolv.conf"]);
    let file = stage.path().join("resolv.conf");
    fs::write(&file, "").expect("file");
    stage.edit(|config| {
        let mount = json!({
            "destination": "/resolv.conf", "type": "bind", "source": file, "options": ["bind", "ro"],
        });
        config["mounts"].as_array_mut().expect("mounts").push(mount);
    });
    assert!(create(&stage, &[]).status.success());
    fs::write(&file, "nameserver 10.0.0.1\n").expect("file");
    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    let output = fs::read_to_string(stage.path().join("output")).expect("output");
    assert_eq!(output, "nameserver 10.0.0.1\n");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn created_container_that_is_killed_never_begins() {
    let stage = Stage::new(&["sh", "-c", "echo begun"]);
    assert!(create(&stage, &[]).status.success());
    succeeds(&stage, &["kill", "test", "TERM"]);
    wait_for(&stage, "stopped");
    assert_eq!(fs::read_to_string(stage.path().join("output")).expect("output"), "");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn killed_monitor_takes_its_sandbox_along_and_delete_removes_the_rest() {
    let stage = Stage::new(&["sleep", "1000"]);
    assert!(create(&stage, &[]).status.success());
    succeeds(&stage, &["start", "test"]);
    let pid = stage.state()["pid"].to_string();
    assert!(Command::new("/bin/kill").args(["-KILL", &pid]).status().expect("kill").success());
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn running_container_is_deleted_by_force() {
    let stage = Stage::new(&["sleep", "1000"]);
    assert!(create(&stage, &[]).status.success());
    succeeds(&stage, &["start", "test"]);
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn detached_run_returns_and_kept_run_stays() {
    let stage = Stage::new(&["sh", "-c", "exit 3"]);
    let output = stage.run(&["--keep"]).output().expect("kiln");
    assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
    assert_eq!(stage.state()["status"], "stopped");
    succeeds(&stage, &["delete", "test"]);

    let mut detached = stage.run(&["--detach"]);
    detached.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    assert!(detached.status().expect("kiln").success());
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn program_that_is_not_found_fails_the_create_and_leaves_nothing() {
    let stage = Stage::new(&["nosuchprogram"]);
    let output = create(&stage, &[]);
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("executable file not found in $PATH"), "{errors}");
    assert!(stage.is_clean());
}

#[test]
fn guests_take_every_mount_option_that_features_lists() {
    let stage = Stage::new(&["true"]);
    let features: Value = serde_json::from_str(&succeeds(&stage, &["features"])).expect("JSON");
    let options = features["mountOptions"].as_array().expect("list").clone();
    let (of_binds, others): (Vec<_>, Vec<_>) =
        options.into_iter().partition(|option| option == "bind" || option == "rbind");
    assert_eq!(of_binds.len(), 2);
    stage.edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        for option in others {
            let destination = format!("/tmp/{}", option.as_str().expect("name"));
            mounts.push(serde_json::json!({
                "destination": destination, "type": "tmpfs", "source": "tmpfs", "options": [option],
            }));
        }
    });
    let output = stage.run(&[]).output().expect("kiln");
    assert!(output.status.success(), "{}", errors(&output));
}

#[test]
fn checkpoints_are_refused_whatever_the_options() {
    let stage = Stage::new(&["true"]);
    for args in [&["checkpoint", "--image-path", "/x", "test"][..], &["restore", "test"]] {
        let output = kiln(&stage, args);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains("is not supported"), "{}", errors(&output));
    }
}
