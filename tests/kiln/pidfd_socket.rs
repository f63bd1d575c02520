//! `--pidfd-socket`: descriptors of the processes that stand for a container and its execs.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::exec::{accept_descriptor, exec};
use crate::lifecycle::{create, succeeds};
use crate::stage::{Stage, errors};

/// The process that a descriptor is of.
fn pid_of(pidfd: &OwnedFd) -> String {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()));
    let info = info.expect("a descriptor");
    let pid = info.lines().find_map(|line| line.strip_prefix("Pid:\t"));
    pid.expect("a process's descriptor").to_owned()
}

fn has_ended(pidfd: &OwnedFd, patience: u16) -> bool {
    let mut polled = [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)];
    poll(&mut polled, PollTimeout::from(patience)).expect("polls") == 1
}

#[test]
fn descriptors_are_of_the_processes_that_stand_for_container_and_exec() {
    let stage = Stage::new(&["sleep", "1000"]);
    let path = stage.path().join("pidfd");
    let listener = UnixListener::bind(&path).expect("listens");
    let option = ["--pidfd-socket", path.to_str().expect("text")];
    let created = create(&stage, &option);
    assert!(created.status.success(), "{}", errors(&created));
    let (container, words) = accept_descriptor(&listener);
    assert_eq!(words, "standard");
    assert_eq!(pid_of(&container), stage.state()["pid"].to_string());
    succeeds(&stage, &["start", "test"]);

    let pid_file = stage.path().join("exec.pid");
    let detached = ["--detach", "--pid-file", pid_file.to_str().expect("text")];
    let mut command = exec(&stage, &[&option[..], &detached].concat(), &["sleep", "1000"]);
    let streams = || Stdio::null();
    command.stdin(streams()).stdout(streams()).stderr(streams());
    assert!(command.status().expect("kiln").success());
    let (process, words) = accept_descriptor(&listener);
    assert_eq!(words, "setns");
    assert_eq!(pid_of(&process), fs::read_to_string(&pid_file).expect("pid file"));

    assert!(!has_ended(&process, 0) && !has_ended(&container, 0));
    succeeds(&stage, &["kill", "test", "KILL"]);
    assert!(has_ended(&container, 60_000) && has_ended(&process, 60_000));
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn nobody_who_listens_is_an_error_before_anything_is_made() {
    let stage = Stage::new(&["true"]);
    let path = stage.path().join("nobody");
    let created = create(&stage, &["--pidfd-socket", path.to_str().expect("text")]);
    assert_eq!(created.status.code(), Some(1));
    let errors = errors(&created);
    assert!(errors.contains("--pidfd-socket ") && errors.contains("No such file"), "{errors}");
    assert!(stage.is_clean());
}
