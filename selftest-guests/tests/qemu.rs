//! The guests on a machine that is not kiln's: QEMU's microvm, its software CPU, by the PVH entry.
//! What fails here is wrong with the guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kiln_selftest_guests::{Guest, RESET, RING_TRANSITIONS, SHUTDOWN, TRIPLE_FAULT};

const DEADLINE: Duration = Duration::from_secs(60);

/// Boots a guest and gives what QEMU left behind when it ended.
fn boot(guest: Guest, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join(guest.name);
    std::fs::write(&image, guest.image).unwrap();
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "microvm,rtc=off,acpi=off"])
        .args(["-m", "128", "-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"])
        .args([
            "-no-reboot",
            "-device",
            "i8042",
            "-device",
            "isa-debug-exit,iobase=0x501,iosize=4",
            "-kernel",
        ])
        .arg(&image)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("these tests need qemu-system-x86_64");
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        if start.elapsed() > DEADLINE {
            child.kill().unwrap();
            break;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    child.wait_with_output().unwrap()
}

/// Boots a guest, expects that it switches the machine off, and gives its lines.
fn lines(guest: Guest, arguments: &[&str]) -> Vec<String> {
    let output = boot(guest, arguments);
    // isa-debug-exit makes an odd status of whatever is written.
    let status = output.status.code().unwrap_or(0);
    assert_eq!(status % 2, 1, "the guest did not switch off: {output:?}");
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn ring_transitions_pass() {
    let lines = lines(RING_TRANSITIONS, &[]);
    assert!(lines.iter().all(|line| line.starts_with("ok ")), "{lines:#?}");
    assert_eq!(lines.last().map(String::as_str), Some("ok syscall"));
}

#[test]
fn shutdown_switches_off() {
    assert!(lines(SHUTDOWN, &[]).is_empty());
}

#[test]
fn reset_and_triple_fault_end_the_machine() {
    for guest in [RESET, TRIPLE_FAULT] {
        let output = boot(guest, &[]);
        assert_eq!(output.status.code(), Some(0), "{}: {output:?}", guest.name);
    }
}
