//! Output that its caller does not read is waited for, but not for ever once the container or the
//! program was killed.

use std::fs;
use std::os::fd::AsRawFd;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::time::Duration;

use crate::exec::running;
use crate::lifecycle::{kiln, succeeds};
use crate::run::eventually;
use crate::stage::{Stage, errors};

/// A command whose output is a pipe that nobody reads. What it says itself goes to this test's own
/// standard error.
fn unread(mut command: Command) -> (Child, ChildStdout) {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("kiln");
    let output = child.stdout.take().expect("a pipe");
    (child, output)
}

/// Waits until a pipe takes no more.
fn until_full(output: &ChildStdout) {
    let held = || {
        let mut bytes: libc::c_int = 0;
        // SAFETY: FIONREAD writes an int to the address of one.
        let done = unsafe { libc::ioctl(output.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        assert_eq!(done, 0);
        bytes
    };
    // Pages of a pipe need not be full.
    eventually("a full pipe", || {
        let before = held();
        std::thread::sleep(Duration::from_secs(1));
        before > 32 << 10 && held() == before
    });
}

#[test]
fn killed_container_ends_though_nobody_reads_its_output() {
    let stage = Stage::new(&["yes"]);
    let (mut child, output) = unread(stage.run(&[]));
    until_full(&output);
    succeeds(&stage, &["kill", "test", "KILL"]);
    assert_eq!(child.wait().expect("ends").code(), Some(137));
    assert!(stage.is_clean());
}

#[test]
fn container_that_has_ended_hears_signals_while_its_output_is_waited_for() {
    let stage = Stage::new(&["head", "-c", "150000", "/dev/zero"]);
    let log = stage.path().join("log");
    let mut command = stage.kiln();
    command.arg("--log").arg(&log).args(["run", "--engine", "emulated", "--bundle"]);
    command.arg(stage.bundle()).arg("test");
    let (mut child, output) = unread(command);
    until_full(&output);
    let logged = || fs::read_to_string(&log).expect("a log");
    eventually("the program's end", || logged().contains("the container has ended"));
    let refused = kiln(&stage, &["kill", "test", "USR1"]);
    assert!(errors(&refused).contains("container not running"), "{}", errors(&refused));
    assert_eq!(stage.state()["status"], "running");
    succeeds(&stage, &["kill", "test", "TERM"]);
    assert_eq!(child.wait().expect("ends").code(), Some(0));
    assert!(logged().contains("not read"), "{}", logged());
    assert!(stage.is_clean());
}

#[test]
fn exec_ends_with_a_killed_container_though_nobody_reads_its_output() {
    let stage = running(&["sleep", "1000"]);
    let mut command = stage.kiln();
    command.args(["exec", "test", "yes"]);
    let (mut child, output) = unread(command);
    until_full(&output);
    succeeds(&stage, &["kill", "test", "KILL"]);
    assert_eq!(child.wait().expect("ends").code(), Some(137));
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}
