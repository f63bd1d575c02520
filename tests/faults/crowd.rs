//! Many sandboxes at once.

use std::fs;
use std::io::Read;
use std::process::{Child, Stdio};
use std::time::Instant;

use kiln_selftest_guests::{IDLE, SHUTDOWN};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::from_environment;
use crate::host::{Host, marked};
use crate::stage::errors;

/// Machines of the kvm engine.
const MACHINES: usize = 100;

#[test]
fn a_hundred_machines_live_at_once_and_end() {
    let stage = marked(&["true"]);
    let before = Host::look(&stage);
    let image = stage.path().join("kernel");
    for guest in [IDLE, SHUTDOWN] {
        let is_idle = guest.name == IDLE.name;
        fs::write(&image, guest.image).expect("written");
        let begin = Instant::now();
        let machine = |_| {
            let mut command = stage.kiln();
            command.args(["vm", "run", "--engine", "kvm", "--memory", "16", "--kernel"]);
            command.arg(&image).stdin(Stdio::null());
            command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kiln")
        };
        let mut machines: Vec<Child> = (0..MACHINES).map(machine).collect();
        if is_idle {
            // Each has executed something, and none has ended.
            for machine in &mut machines {
                let stdout = machine.stdout.as_mut().expect("a pipe");
                assert_eq!(stdout.read(&mut [0]).expect("reads"), 1);
            }
            println!("{MACHINES} machines run after {:?}", begin.elapsed());
            for machine in &mut machines {
                assert!(machine.try_wait().expect("a child").is_none());
                let pid = Pid::from_raw(machine.id().try_into().expect("a pid"));
                kill(pid, Signal::SIGTERM).expect("sent");
            }
        }
        for machine in machines {
            let output = machine.wait_with_output().expect("ends");
            let expected = if is_idle { 143 } else { 0 };
            assert_eq!(output.status.code(), Some(expected), "{}", errors(&output));
        }
        println!("all have ended after {:?}", begin.elapsed());
    }
    before.is_as_before(&stage);
}

/// Whole sandboxes at once, each with its own container: as many as `KILN_FAULT_CROWD` says.
#[test]
fn several_sandboxes_live_at_once_and_end() {
    let count = from_environment("KILN_FAULT_CROWD").unwrap_or(3);
    let stage = marked(&["sh", "-c", "echo up; sleep 1; exit 3"]);
    stage.edit(|config| {
        config["linux"].as_object_mut().expect("an object").remove("cgroupsPath");
    });
    let before = Host::look(&stage);
    let begin = Instant::now();
    let sandbox = |number: u64| {
        let mut command = stage.kiln();
        command.args(["run", "--engine", "emulated", "--memory", "160", "--cpus", "1", "--bundle"]);
        command.arg(stage.bundle()).arg(format!("crowd-{number}-{}", std::process::id()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("kiln")
    };
    let sandboxes: Vec<Child> = (0..count).map(sandbox).collect();
    for sandbox in sandboxes {
        let output = sandbox.wait_with_output().expect("ends");
        assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
        assert_eq!(output.stdout, b"up\n");
    }
    println!("{count} sandboxes have ended after {:?}", begin.elapsed());
    before.is_as_before(&stage);
}
