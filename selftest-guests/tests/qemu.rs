//! The guests on a machine that is not kiln's: QEMU's microvm, its software CPU, by the PVH entry.
//! What fails here is wrong with the guest.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kiln_selftest_guests::*;

const DEADLINE: Duration = Duration::from_secs(60);

/// Boots a guest and gives what QEMU left behind when it ended.
fn boot(guest: Guest, arguments: &[&str]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join(guest.name);
    std::fs::write(&image, guest.image).unwrap();
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg,thread=multi", "-cpu", "max", "-M", "microvm,rtc=off,acpi=off"])
        .args(["-m", "128", "-nodefaults", "-no-user-config", "-nographic", "-serial", "stdio"])
        .args(["-no-reboot", "-global", "virtio-mmio.force-legacy=false"])
        .args(["-device", "i8042", "-device", "isa-debug-exit,iobase=0x501,iosize=4", "-kernel"])
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

/// Boots a guest, expects that every line is `ok`, and gives what was.
fn all_ok(guest: Guest, arguments: &[&str]) -> Vec<String> {
    let lines = lines(guest, arguments);
    let names = lines.iter().map(|line| line.strip_prefix("ok ").map(str::to_owned));
    names.collect::<Option<_>>().unwrap_or_else(|| panic!("{}: {lines:#?}", guest.name))
}

#[test]
fn ring_transitions_pass() {
    let names = all_ok(RING_TRANSITIONS, &[]);
    assert_eq!(names.last().map(String::as_str), Some("syscall"));
}

#[test]
fn ring_speed_is_measured() {
    let lines = lines(RING_SPEED, &["-append", "tsc_khz=1000000"]);
    for (line, ring) in lines.iter().zip(["ring0", "ring3"]) {
        assert!(line.starts_with(&format!("{ring} instructions=")), "{line}");
        let rate: u64 = line.split_once(" per_second=").unwrap().1.parse().unwrap();
        assert!(rate > 0, "{line}");
    }
    assert_eq!(lines.len(), 2);
}

#[test]
fn further_cpus_start() {
    let names = all_ok(SMP, &["-smp", "3", "-append", "cpus=3"]);
    assert_eq!(names.iter().filter(|name| *name == "start of a CPU").count(), 2);
    assert_eq!(names.iter().filter(|name| *name == "interrupt to a CPU").count(), 2);
}

#[test]
fn virtio_devices_are_discovered() {
    let lines = lines(VIRTIO_DISCOVERY, &["-device", "virtio-rng-device"]);
    // QEMU accepts what the specification lets a device refuse.
    let lenient = ["FAIL driver without version 1:", "FAIL feature that isn't offered:"];
    let passes = |line: &&String| {
        line.starts_with("ok ") || lenient.iter().any(|lenient| line.starts_with(lenient))
    };
    assert!(lines[0].starts_with("device base=0x") && lines[0].ends_with(" id=4"), "{lines:#?}");
    assert!(lines[1..].iter().all(|line| passes(&line)), "{lines:#?}");
    assert!(lines.len() > 8, "{lines:#?}");
}

#[test]
fn block_devices_are_read_and_written() {
    let folder = tempfile::tempdir().unwrap();
    let before: Vec<u8> = (0..1u64 << 15).flat_map(u64::to_le_bytes).collect();
    let [writable, read_only] = ["writable", "read-only"].map(|name| folder.path().join(name));
    std::fs::write(&writable, &before).unwrap();
    std::fs::write(&read_only, &before).unwrap();
    let drive = |path: &std::path::Path, rest: &str| {
        format!("file={},format=raw,if=none,{rest}", path.display())
    };
    let names = all_ok(
        BLOCK,
        &[
            "-drive",
            &drive(&writable, "id=a"),
            "-device",
            "virtio-blk-device,drive=a",
            "-drive",
            &drive(&read_only, "id=b,readonly=on"),
            "-device",
            "virtio-blk-device,drive=b",
        ],
    );
    for name in ["write and read", "flush", "write to a read-only disk"] {
        assert!(names.iter().any(|found| found == name), "{name}: {names:#?}");
    }
    let mut after = before.clone();
    let half = before.len() / 2;
    after[half..half + 64 * 512].iter_mut().for_each(|byte| *byte = !*byte);
    assert!(std::fs::read(&writable).unwrap() == after);
    assert!(std::fs::read(&read_only).unwrap() == before);
}

#[test]
fn entropy_is_drawn_and_the_console_written() {
    let folder = tempfile::tempdir().unwrap();
    let console = folder.path().join("console");
    let names = all_ok(
        RNG_AND_CONSOLE,
        &[
            "-device",
            "virtio-rng-device",
            "-device",
            "virtio-serial-device",
            "-chardev",
            &format!("file,id=c,path={}", console.display()),
            "-device",
            "virtconsole,chardev=c",
        ],
    );
    assert_eq!(names, ["entropy", "entropy", "entropy differs", "console output"]);
    assert_eq!(std::fs::read(&console).unwrap(), b"hello from the guest\n");
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
