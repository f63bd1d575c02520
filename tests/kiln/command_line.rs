//! The command line itself: what is wrong with it, and what is generated from its definition.

use std::fs;
use std::process::{Command, Stdio};

use crate::stage::{Stage, errors};

fn kiln() -> Command {
    Command::new(env!("CARGO_BIN_EXE_kiln"))
}

#[test]
fn wrong_command_lines_fail_as_everything_does() {
    let stage = Stage::new(&["true"]);
    let log = stage.path().join("log.json");
    for (args, named) in [
        (&["run", "--no-such-option", "test"][..], "--no-such-option"),
        (&["state"][..], "<ID>"),
        (&["no-such-verb"][..], "no-such-verb"),
        (&["list", "--format", "yaml"][..], "yaml"),
    ] {
        let mut command = stage.kiln();
        command.arg("--log").arg(&log).args(["--log-format", "json"]).args(args);
        let output = command.output().expect("kiln");
        assert_eq!(output.status.code(), Some(1), "{args:?}");
        let errors = errors(&output);
        assert!(errors.contains(named) && errors.lines().count() == 1, "{errors}");
        let lines = fs::read_to_string(&log).expect("log");
        let last: serde_json::Value =
            serde_json::from_str(lines.lines().last().expect("a line")).expect("JSON");
        assert_eq!(last["level"], "error");
        assert!(last["msg"].as_str().expect("text").contains(named), "{last}");
    }
}

#[test]
fn completions_are_valid_for_their_shell() {
    let script = |shell: &str| {
        let output = kiln().args(["completions", shell]).output().expect("kiln");
        assert!(output.status.success(), "{}", errors(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    let bash = script("bash");
    let program = format!("{bash}\ncomplete -p kiln");
    let output = Command::new("bash").args(["--norc", "-c", &program]).output().expect("bash");
    assert!(output.status.success(), "{}", errors(&output));
    assert!(String::from_utf8_lossy(&output.stdout).contains("_kiln"));
    for shell in ["bash", "zsh", "fish"] {
        let script = script(shell);
        assert!(script.contains("--console-socket") || script.contains("console-socket"));
        assert!(!script.contains("--config-fd"), "hidden verbs are nobody's to call");
    }
    assert_eq!(kiln().args(["completions", "tcsh"]).output().expect("kiln").status.code(), Some(1));
}

#[test]
fn manual_pages_are_written_for_every_verb() {
    let stage = Stage::new(&["true"]);
    let directory = stage.path().join("man");
    let into_nothing = kiln().arg("man").arg(&directory).output().expect("kiln");
    assert_eq!(into_nothing.status.code(), Some(1));
    fs::create_dir(&directory).expect("made");
    let output = kiln().arg("man").arg(&directory).output().expect("kiln");
    assert!(output.status.success(), "{}", errors(&output));
    for page in ["kiln.1", "kiln-create.1", "kiln-run.1", "kiln-delete.1"] {
        let page = fs::read_to_string(directory.join(page)).expect(page);
        assert!(page.contains(".SH NAME") && page.contains(".SH SYNOPSIS"), "{page}");
    }
    assert!(!directory.join("kiln-monitor.1").exists());
}

#[test]
fn options_may_stand_behind_the_id_and_be_runcs() {
    let stage = Stage::new(&["true"]);
    let mut command = stage.kiln();
    command.args(["--systemd-cgroup", "--rootless", "auto", "create", "test", "--no-pivot"]);
    command.args(["--no-new-keyring", "--bundle", "/no/such/bundle"]);
    let output = command.stdin(Stdio::null()).output().expect("kiln");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("/no/such/bundle"), "{}", errors(&output));
}

#[test]
fn version_is_as_callers_read_it() {
    let output = kiln().arg("--version").output().expect("kiln");
    let text = String::from_utf8(output.stdout).expect("text");
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(text.lines().next(), Some(format!("kiln version {version}").as_str()));
    assert!(text.lines().any(|line| line == "spec: 1.2.0"), "{text}");
    // Docker takes the last line with that word for the version.
    assert_eq!(text.matches("version").count(), 1, "{text}");
}
