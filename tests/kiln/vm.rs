//! `kiln vm run`.

use std::fs;
use std::io::Read;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use kiln_selftest_guests::{BLOCK, Guest, RESET, SHUTDOWN, SPIN, TRIPLE_FAULT};

use crate::run::processes_of;
use crate::stage::{Stage, errors, lib_dir};

const ENGINES: [&str; 2] = ["kvm", "emulated"];

/// Writes a guest's image to a file.
fn image(stage: &Stage, guest: Guest) -> PathBuf {
    let path = stage.path().join(guest.name);
    fs::write(&path, guest.image).expect("written");
    path
}

fn run(stage: &Stage, engine: &str, guest: Guest, options: &[&str]) -> Output {
    let mut command = stage.kiln();
    command.args(["vm", "run", "--engine", engine, "--memory", "128", "--kernel"]);
    command.arg(image(stage, guest)).args(options).stdin(Stdio::null());
    command.output().expect("kiln runs")
}

#[test]
fn ends_of_a_guest_are_told_by_the_status() {
    for engine in ENGINES {
        for (guest, status) in [(SHUTDOWN, 0), (RESET, 0), (TRIPLE_FAULT, 3)] {
            let stage = Stage::new(&["true"]);
            let output = run(&stage, engine, guest, &[]);
            let name = guest.name;
            assert_eq!(output.status.code(), Some(status), "{engine} {name}: {}", errors(&output));
            assert!(stage.is_clean());
        }
    }
}

/// kiln's own kernel without a root file system: it panics, and `panic=-1` resets the machine by a
/// triple fault, which is how an x86 kernel without firmware does it.
#[test]
fn emulated_kernel_talks_on_standard_output_and_its_end_is_told() {
    let stage = Stage::new(&["true"]);
    let output = stage
        .kiln()
        .args(["vm", "run", "--engine", "emulated", "--memory", "256", "--kernel"])
        .arg(lib_dir().join("vmlinux"))
        .args(["--cmdline", "console=ttyS0 panic=-1 reboot=t"])
        .stdin(Stdio::null())
        .output()
        .expect("kiln runs");
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(console.contains("Linux version"), "{console}{}", errors(&output));
    assert!(console.contains("Unable to mount root fs"), "{console}");
    assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
    assert!(errors(&output).contains("triple-faulted"), "{}", errors(&output));
}

/// The guest makes 216 requests of 114,000 bytes in all, each with a right answer.
#[test]
fn disks_wait_for_their_turn() {
    let numbered: Vec<u8> = (0..256 * 64u64).flat_map(u64::to_le_bytes).collect();
    for (engine, limit) in [("kvm", ["--iops", "60"]), ("emulated", ["--disk-bandwidth", "30K"])] {
        let stage = Stage::new(&["true"]);
        let path = stage.path().join("disk");
        fs::write(&path, &numbered).expect("written");
        let begin = Instant::now();
        let options = ["--disk", path.to_str().expect("text"), limit[0], limit[1]];
        let output = run(&stage, engine, BLOCK, &options);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{engine}: {said}{}", errors(&output));
        assert!(said.contains("ok ") && !said.contains("FAIL"), "{engine}: {said}");
        // It can only take longer on a busy machine.
        assert!(begin.elapsed() > Duration::from_millis(3400), "{limit:?}: {:?}", begin.elapsed());
    }
}

#[test]
fn disks_are_found_in_order_and_read_only_ones_stay_as_they_are() {
    let numbered: Vec<u8> = (0..256 * 64u64).flat_map(u64::to_le_bytes).collect();
    for engine in ENGINES {
        let stage = Stage::new(&["true"]);
        let disk = |name: &str| {
            let path = stage.path().join(name);
            fs::write(&path, &numbered).expect("written");
            path.to_str().expect("text").to_owned()
        };
        let (writable, read_only) = (disk("writable"), disk("read-only"));
        let read_only_option = format!("{read_only}:ro");
        let options = ["--disk", writable.as_str(), "--disk", read_only_option.as_str()];
        let output = run(&stage, engine, BLOCK, &options);
        let said = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{engine}: {said}{}", errors(&output));
        assert!(said.contains("ok ") && !said.contains("FAIL"), "{engine}: {said}");
        assert!(fs::read(&read_only).expect("there") == numbered, "{engine}: was written to");
        assert!(fs::read(&writable).expect("there") != numbered, "{engine}: was not written to");
    }
}

/// QEMU has everything in its caller's name then, in namespaces that the caller may make. Nobody but root
/// opens `/dev/kvm` where the tests run.
#[test]
fn caller_without_root_runs_emulated_machines() {
    const USER: u32 = 61_235;

    let stage = Stage::new(&["true"]);
    fs::create_dir(stage.root()).expect("made");
    chown(stage.root(), Some(USER), Some(USER)).expect("changed");
    let command = |guest: Guest| {
        let kernel = image(&stage, guest);
        for path in [stage.path(), &kernel] {
            fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
        }
        let mut command = stage.kiln();
        command.args(["vm", "run", "--engine", "emulated", "--memory", "64", "--kernel"]);
        command.arg(kernel).uid(USER).gid(USER).stdin(Stdio::null());
        command
    };
    for (guest, status) in [(SHUTDOWN, 0), (TRIPLE_FAULT, 3)] {
        let output = command(guest).output().expect("kiln runs");
        assert_eq!(output.status.code(), Some(status), "{}: {}", guest.name, errors(&output));
    }
    let mut child = command(SPIN).stdout(Stdio::piped()).spawn().expect("kiln runs");
    let mut byte = [0];
    child.stdout.as_mut().expect("a pipe").read_exact(&mut byte).expect("its guest runs");
    child.kill().expect("killed");
    child.wait().expect("ends");
    let begin = Instant::now();
    while !processes_of(&stage).is_empty() {
        assert!(begin.elapsed() < Duration::from_secs(60), "processes are left");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn signal_ends_the_guest() {
    for engine in ENGINES {
        let stage = Stage::new(&["true"]);
        let mut child = stage
            .kiln()
            .args(["vm", "run", "--engine", engine, "--kernel"])
            .arg(image(&stage, SPIN))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .expect("kiln runs");
        let mut byte = [0];
        let stdout = child.stdout.as_mut().expect("a pipe");
        assert_eq!(stdout.read(&mut byte).expect("reads"), 1, "{engine}: ended early");
        let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
        assert_eq!(child.wait().expect("ends").code(), Some(143), "{engine}");
        assert!(stage.is_clean());
    }
}

#[test]
fn file_that_is_no_kernel_is_refused() {
    for engine in ENGINES {
        let stage = Stage::new(&["true"]);
        let output = stage
            .kiln()
            .args(["vm", "run", "--engine", engine, "--kernel", "/etc/passwd"])
            .stdin(Stdio::null())
            .output()
            .expect("kiln runs");
        assert_eq!(output.status.code(), Some(1), "{engine}: {}", errors(&output));
        assert!(errors(&output).contains("kernel"), "{engine}: {}", errors(&output));
    }
}
