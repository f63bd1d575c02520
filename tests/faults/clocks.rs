//! Clocks that jump, and everything standing still: what the suspend of a host or of a machine that
//! the host is looks like from inside.

use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::host::{Host, marked, role};
use crate::stage::{Stage, create, errors, eventually, kiln, processes_of, succeeds, wait_for};

/// `kiln` in a time namespace in which the host was booted a day and a bit earlier.
fn a_day_later(stage: &Stage, args: &[&str]) -> Command {
    let kiln = stage.kiln();
    let mut command = Command::new("unshare");
    command.args(["--time", "--fork", "--monotonic", "86400", "--boottime", "100000"]);
    command.arg(kiln.get_program()).args(kiln.get_args()).args(args);
    command.envs(kiln.get_envs().filter_map(|(name, value)| Some((name, value?))));
    command
}

#[test]
fn a_sandbox_is_the_same_in_every_time_namespace() {
    let stage = marked(&["sleep", "1000"]);
    let before = Host::look(&stage);
    let bundle = stage.bundle();
    let bundle = bundle.to_str().expect("text");
    let create = ["create", "--engine", "emulated", "--bundle", bundle, "test"];
    let quiet = |mut command: Command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().expect("kiln, by unshare of util-linux").success()
    };

    // Made there, used here.
    assert!(quiet(a_day_later(&stage, &create)));
    assert_eq!(stage.state()["status"], "created");
    succeeds(&stage, &["start", "test"]);
    assert_eq!(succeeds(&stage, &["exec", "test", "sh", "-c", "echo said"]), "said\n");
    succeeds(&stage, &["delete", "--force", "test"]);
    before.is_as_before(&stage);

    // Made here, used there.
    let mut here = stage.kiln();
    here.args(create);
    assert!(quiet(here));
    assert!(quiet(a_day_later(&stage, &["start", "test"])));
    let state = a_day_later(&stage, &["state", "test"]).output().expect("kiln");
    assert!(String::from_utf8_lossy(&state.stdout).contains("\"running\""), "{}", errors(&state));
    assert!(quiet(a_day_later(&stage, &["delete", "--force", "test"])));
    before.is_as_before(&stage);
}

/// No test sets the host's clock; but that the monitor is told when somebody does is the kernel's word,
/// for a timer that is set like this.
#[test]
fn a_monitor_waits_for_the_hosts_clock_to_be_set() {
    let stage = marked(&["sleep", "1000"]);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let descriptors = fs::read_dir(format!("/proc/{}/fdinfo", stage.state()["pid"]));
    let watches = descriptors.expect("a monitor").flatten().any(|descriptor| {
        let about = fs::read_to_string(descriptor.path()).unwrap_or_default();
        // CLOCK_REALTIME; TFD_TIMER_ABSTIME and TFD_TIMER_CANCEL_ON_SET.
        about.contains("clockid: 0\n") && about.contains("settime flags: 03\n")
    });
    assert!(watches, "there is no such timer");
    succeeds(&stage, &["delete", "--force", "test"]);
}

fn send(processes: &[i32], signal: Signal) {
    for pid in processes {
        kill(Pid::from_raw(*pid), signal).expect("sent");
    }
}

#[test]
fn time_in_which_everything_stood_still_is_nobodys_fault() {
    let stage = marked(&["sleep", "1000"]);
    let before = Host::look(&stage);
    let settings = stage.path().join("kiln.toml");
    fs::write(&settings, "shutdown_deadline = 5\n").expect("written");
    let log = stage.path().join("log");
    let mut command = stage.kiln();
    command.arg("--config").arg(&settings).arg("--log").arg(&log);
    command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    let child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().expect("kiln");
    eventually("running", || {
        let state = kiln(&stage, &["state", "test"]);
        String::from_utf8_lossy(&state.stdout).contains("\"running\"")
    });

    // While it runs and nothing happens.
    let all = processes_of(&stage);
    send(&all, Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(4));
    send(&all, Signal::SIGCONT);
    assert_eq!(succeeds(&stage, &["exec", "test", "sh", "-c", "echo said"]), "said\n");

    // While the guest has something to do by a deadline, for longer than that.
    let machine: Vec<_> = all.iter().copied().filter(|pid| role(*pid) == "QEMU").collect();
    send(&machine, Signal::SIGSTOP);
    succeeds(&stage, &["kill", "test", "KILL"]);
    send(&all, Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(8));
    send(&all, Signal::SIGCONT);
    let output = child.wait_with_output().expect("ends");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(137), "{errors}");
    assert_eq!(errors, "", "the guest has ended the container by itself");
    let log = fs::read_to_string(log).expect("log");
    assert!(!log.contains("in time"), "{log}");
    before.is_as_before(&stage);
}

#[test]
fn a_created_container_outlives_a_standstill() {
    let stage = marked(&["sh", "-c", "exit 7"]);
    let before = Host::look(&stage);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let all = processes_of(&stage);
    send(&all, Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(stage.state()["status"], "created");
    send(&all, Signal::SIGCONT);
    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    before.is_as_before(&stage);
}
