//! The command that a caller called dies, at any point of any verb: the sandbox is whole or gone, and
//! what others ask of it is answered.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::host::{Host, marked};
use crate::stage::{Stage, create, errors, eventually, kiln, processes_of, succeeds};

/// In how many places of a verb's usual time its command is killed.
const PLACES: u32 = 3;

/// Calls a command to its end; gives how long that took.
fn timed(command: &mut Command) -> Duration {
    let begin = Instant::now();
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().expect("kiln");
    begin.elapsed()
}

/// Calls a command that is killed after a while.
fn cut_short(command: &mut Command, after: Duration) {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("kiln");
    std::thread::sleep(after);
    // It may have ended by itself.
    let _ = child.kill();
    child.wait().expect("ends");
}

/// A caller of `args` on a container that runs may die at any point.
fn dies(stage: &Stage, args: &[&str]) {
    let usual = timed(stage.kiln().args(args));
    for place in 0..PLACES {
        cut_short(stage.kiln().args(args), usual * place / PLACES);
    }
}

#[test]
fn callers_of_a_running_container_may_die() {
    let stage = marked(&["sleep", "1000"]);
    let before = Host::look(&stage);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    dies(&stage, &["start", "test"]);
    for args in [
        &["state", "test"][..],
        &["list"],
        &["exec", "test", "sh", "-c", "sleep 0.2; echo said"],
        &["exec", "--detach", "test", "sleep", "0.2"],
        &["ps", "test"],
        &["events", "--stats", "test"],
        &["update", "--pids-limit", "200", "test"],
        &["kill", "test", "USR1"],
        &["pause", "test"],
        &["resume", "test"],
    ] {
        dies(&stage, args);
    }
    // Whichever of them came through, it may be paused by now.
    let _ = kiln(&stage, &["resume", "test"]);
    assert_eq!(stage.state()["status"], "running");
    assert_eq!(succeeds(&stage, &["exec", "test", "sh", "-c", "echo said"]), "said\n");
    // Only monitor, file system, devices and QEMU are left.
    eventually("the end of what stood for execs", || processes_of(&stage).len() == 4);
    cut_short(stage.kiln().args(["delete", "--force", "test"]), Duration::from_millis(10));
    succeeds(&stage, &["delete", "--force", "test"]);
    before.is_as_before(&stage);
}

#[test]
fn callers_that_make_a_container_may_die() {
    let stage = marked(&["sh", "-c", "sleep 0.2"]);
    let before = Host::look(&stage);
    let bundle = stage.bundle();
    let bundle = bundle.to_str().expect("text");
    for verb in [&["create"][..], &["run"], &["run", "--detach"]] {
        let command = || {
            let mut command = stage.kiln();
            command.args(verb).args(["--engine", "emulated", "--bundle", bundle, "test"]);
            command
        };
        let usual = timed(&mut command());
        succeeds(&stage, &["delete", "--force", "test"]);
        for place in 0..PLACES {
            cut_short(&mut command(), usual * place / PLACES);
            // What was begun ends by itself, or is whole.
            eventually("a state that lasts", || {
                let state = kiln(&stage, &["state", "test"]);
                let said = String::from_utf8_lossy(&state.stdout).into_owned();
                !said.contains("\"creating\"")
            });
            succeeds(&stage, &["delete", "--force", "test"]);
            before.is_as_before(&stage);
        }
    }
}
