//! `kiln doctor` and the choice of the engine, from outside.
//!
//! Each test that reads or writes the remembered verdict has a `/run` of its own, in a mount
//! namespace of its own; so these tests need root.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use kiln_selftest_guests::SHUTDOWN;
use serde_json::Value;

const KILN: &str = env!("CARGO_BIN_EXE_kiln");
const VERDICT: &str = "/run/kiln/@engine.json";
const NOBODY: u32 = 65534;

/// Runs a shell script with an empty `/run`; `$1` is kiln, `$2` where the verdict is kept.
fn in_private_run(script: &str, arguments: &[&Path]) -> Output {
    let script = format!("set -e; mount -t tmpfs none /run; {script}");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh", KILN, VERDICT])
        .args(arguments)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(!errors.contains("mount:"), "these tests need root: {errors}");
    output
}

/// A verdict as kiln remembers it, for this boot of the host.
fn remembered(verdict: &str) -> String {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let (boot_id, version) = (boot_id.trim(), env!("CARGO_PKG_VERSION"));
    format!(r#"{{"boot_id":"{boot_id}","version":"{version}","verdict":{verdict}}}"#)
}

/// The commands that put a verdict where kiln remembers it.
fn remember(verdict: &str) -> String {
    format!("mkdir -m 700 /run/kiln; echo '{}' >$2; ", remembered(verdict))
}

fn report(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{report:#}"))
}

fn explanation<'a>(report: &'a Value, name: &str) -> &'a str {
    check(report, name)["explanation"].as_str().unwrap()
}

#[test]
fn the_self_test_comes_to_a_verdict_and_remembers_it() {
    let output = in_private_run("$1 doctor --format json; cat $2 >&2", &[]);
    let report = report(&output);
    // Whether this host's KVM runs Linux or not, it must be able to tell.
    let explanation = explanation(&report, "kvm self-test");
    let runs = explanation.starts_with("this KVM runs Linux guests: ");
    let cannot = explanation.starts_with("this KVM cannot run a Linux guest: ");
    assert!(runs || cannot, "{explanation}");
    assert_eq!(report["engine"], if runs { "kvm" } else { "emulated" });
    assert_eq!(report["usable"], true);
    let remembered: Value = serde_json::from_slice(&output.stderr).unwrap();
    let name = if runs { "runs_linux" } else { "cannot_run_linux" };
    assert!(remembered["verdict"].get(name).is_some(), "{remembered}");
}

#[test]
fn a_remembered_verdict_is_believed_until_asked_for_a_fresh_one() {
    let verdict = remember(r#"{"runs_linux":{"ring0_per_second":123000000}}"#);
    let output = in_private_run(&format!("{verdict} $1 doctor --format json"), &[]);
    let remembered = report(&output);
    assert!(explanation(&remembered, "kvm self-test").contains(" 123 million "), "{remembered:#}");
    assert_eq!(remembered["engine"], "kvm");

    let output = in_private_run(&format!("{verdict} $1 doctor --fresh --format json"), &[]);
    let fresh = report(&output);
    assert!(!explanation(&fresh, "kvm self-test").contains(" 123 million "), "{fresh:#}");
}

#[test]
fn a_damaged_verdict_is_replaced() {
    let script = "mkdir -m 700 /run/kiln; echo '{\"boot_id\":' >$2; \
                  $1 doctor --format json; cat $2 >&2";
    let output = in_private_run(script, &[]);
    assert!(explanation(&report(&output), "kvm self-test").starts_with("this KVM "));
    let remembered: Value = serde_json::from_slice(&output.stderr).unwrap();
    assert!(remembered["verdict"].is_object(), "{remembered}");
}

#[test]
fn a_user_without_permission_is_told_the_mend() {
    let output = Command::new(KILN)
        .args(["doctor", "--format", "json"])
        .env_remove("XDG_RUNTIME_DIR")
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    let report = report(&output);
    let device = check(&report, "kvm device");
    assert_eq!(device["status"], "fail", "{report:#}");
    assert!(device["explanation"].as_str().unwrap().starts_with("no permission to open /dev/kvm"));
    let mend = device["mend"].as_str().unwrap();
    assert!(mend.contains("usermod -aG") || mend.contains("setfacl"), "{mend}");
    assert_eq!(check(&report, "privileges")["status"], "fail");
    assert_eq!(report["engine"], "emulated");
    assert!(report["blockers"].as_array().unwrap().contains(&"privileges".into()), "{report:#}");
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn without_any_engine_the_exit_status_is_1_and_text_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    std::fs::write(&config, "qemu = \"/nonexistent/qemu\"\n").unwrap();
    let cannot = remember(r#"{"cannot_run_linux":{"reason":"it is a test"}}"#);
    let script = format!("{cannot} exec $1 --config $3 doctor");
    let output = in_private_run(&script, &[&config]);
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "FAIL  kvm self-test   this KVM cannot run a Linux guest: it is a test",
        "FAIL  qemu            /nonexistent/qemu is not there",
        "No engine can run guests on this host.",
        "kiln can't run containers until this is mended: kvm self-test, qemu",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line}\n{text}");
    }
}

#[test]
fn without_a_guest_kernel_the_exit_status_is_1_and_text_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let runs = remember(r#"{"runs_linux":{"ring0_per_second":123000000}}"#);
    let script = format!("{runs} exec $1 --lib-dir $3 doctor");
    let output = in_private_run(&script, &[folder.path()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    for line in [
        "FAIL  guest kernel    no guest kernel and agent in ",
        "kiln can't run containers until this is mended: guest kernel, guest agent.",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line}\n{text}");
    }
}

#[test]
fn auto_falls_back_with_one_line_that_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let guest = folder.path().join("guest");
    std::fs::write(&guest, SHUTDOWN.image).unwrap();
    let cannot = remember(r#"{"cannot_run_linux":{"reason":"it is a test"}}"#);
    let script = format!("{cannot} exec $1 vm run --memory 64 --kernel $3");
    let output = in_private_run(&script, &[&guest]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text.lines().count(), 1, "{text}");
    assert!(text.starts_with("kiln: engine: emulated "), "{text}");
    assert!(text.contains("not a security boundary") && text.contains("it is a test"), "{text}");
}

#[test]
fn kvm_by_name_is_refused_where_it_cannot_run_linux() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("rootfs")).unwrap();
    let cannot = remember(r#"{"cannot_run_linux":{"reason":"it is a test"}}"#);
    let script =
        format!("{cannot} $1 spec --bundle $3; exec $1 run --engine kvm --bundle $3 doctor-test");
    let output = in_private_run(&script, &[folder.path()]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stderr).unwrap();
    let error = "kiln: the kvm engine can't be used here: this KVM cannot run a Linux guest: it is a \
                 test; `kiln doctor` shows each check";
    assert!(text.starts_with(error), "{text}");
}
