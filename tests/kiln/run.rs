//! `kiln run`: what a caller sees of a container's life.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Output, Stdio};

use serde_json::{Value, json};

use crate::stage::{Stage, errors};
pub use crate::stage::{eventually, processes_of};

fn run(args: &[&str]) -> (Stage, Output) {
    let stage = Stage::new(args);
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
    (stage, output)
}

/// Waits until a child has written this line to the pipe that is its standard output.
pub fn wait_for_line(child: &mut Child, line: &str) {
    let mut stdout = child.stdout.take().expect("a pipe");
    let mut seen = String::new();
    let mut byte = [0];
    while !seen.lines().any(|seen| seen == line) || !seen.ends_with('\n') {
        assert_eq!(stdout.read(&mut byte).expect("reads"), 1, "ended after {seen:?}");
        seen.push(char::from(byte[0]));
    }
    child.stdout = Some(stdout);
}

#[test]
fn status_is_the_steps_own() {
    let (_, output) = run(&["sh", "-c", "exit 7"]);
    assert_eq!(output.status.code(), Some(7), "{}", errors(&output));
}

#[test]
fn death_by_signal_is_128_and_the_signal() {
    // The first process of a pid namespace is immune to its own signals: a child isn't.
    let (_, output) = run(&["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]);
    assert_eq!(output.status.code(), Some(137), "{}", errors(&output));
}

#[test]
fn absent_and_unexecutable_programs_are_127_and_126() {
    let (_, output) = run(&["no-such-program"]);
    assert_eq!(output.status.code(), Some(127));
    let expected = "exec: \"no-such-program\": executable file not found in $PATH";
    assert!(errors(&output).contains(expected), "{}", errors(&output));

    let (_, output) = run(&["/proc/version"]);
    assert_eq!(output.status.code(), Some(126));
    assert!(errors(&output).contains("permission denied"), "{}", errors(&output));
}

#[test]
fn standard_streams_are_kept_apart_and_whole() {
    let stage = Stage::new(&["sh", "-c", "echo to stderr >&2; cat"]);
    let mut child = stage
        .run(&[])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("kiln runs");
    let input: Vec<u8> =
        (0..3_000_000u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut stdin = child.stdin.take().expect("a pipe");
    let written = input.clone();
    let writer = std::thread::spawn(move || stdin.write_all(&written));
    let output = child.wait_with_output().expect("ends");
    writer.join().expect("joins").expect("all was taken");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(output.stdout == input, "{} of {} bytes", output.stdout.len(), input.len());
    assert_eq!(errors(&output), "to stderr\n");
}

#[test]
fn reader_that_goes_away_ends_the_writer() {
    let stage = Stage::new(&["sh", "-c", "yes; echo $? >/status"]);
    let mut child = stage.run(&[]).stdout(Stdio::piped()).spawn().expect("kiln runs");
    wait_for_line(&mut child, "y");
    drop(child.stdout.take());
    child.wait().expect("ends");
    let status = fs::read_to_string(stage.rootfs().join("status")).expect("yes has ended");
    assert_ne!(status.trim(), "0");
}

#[test]
fn signals_reach_the_step() {
    let script = "trap 'echo caught; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let stage = Stage::new(&["sh", "-c", script]);
    let mut child = stage.run(&[]).stdout(Stdio::piped()).spawn().expect("kiln runs");
    wait_for_line(&mut child, "ready");
    let pid = nix::unistd::Pid::from_raw(child.id().try_into().expect("a pid"));
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).expect("sent");
    wait_for_line(&mut child, "caught");
    assert_eq!(child.wait().expect("ends").code(), Some(5));
    assert!(stage.is_clean());
}

#[test]
fn files_written_are_on_the_host() {
    let stage = Stage::new(&["sh", "-c", "echo content >/made; chmod 640 /made"]);
    fs::create_dir(stage.path().join("volume")).expect("made");
    stage.edit(|config| {
        config["process"]["args"][2] =
            json!("echo content >/volume/made && ! echo x >/volume-ro/made 2>/dev/null");
        let bind = |destination: &str, options: Value| {
            json!({
                "destination": destination, "type": "bind",
                "source": stage.path().join("volume"), "options": options,
            })
        };
        let mounts = config["mounts"].as_array_mut().expect("list");
        mounts.push(bind("/volume", json!(["rbind", "rw"])));
        mounts.push(bind("/volume-ro", json!(["rbind", "ro"])));
    });
    let output = stage.run(&[]).output().expect("kiln runs");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let made = fs::read_to_string(stage.path().join("volume/made")).expect("on the host");
    assert_eq!(made, "content\n");
}

#[test]
fn read_only_root_stays_as_it_is() {
    let stage = Stage::new(&["sh", "-c", "echo x >/made"]);
    stage.edit(|config| config["root"]["readonly"] = json!(true));
    let output = stage.run(&[]).output().expect("kiln runs");
    assert_ne!(output.status.code(), Some(0));
    assert!(errors(&output).contains("Read-only file system"), "{}", errors(&output));
    assert!(!stage.rootfs().join("made").exists());
}

#[test]
fn pid_file_and_state_name_the_monitor_while_it_runs() {
    let stage = Stage::new(&["sh", "-c", "echo ready; cat"]);
    let pid_file = stage.path().join("pid");
    let mut child = stage
        .run(&["--pid-file", pid_file.to_str().expect("text")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kiln runs");
    wait_for_line(&mut child, "ready");
    eventually("the pid file", || pid_file.exists());
    let pid: i32 = fs::read_to_string(&pid_file).expect("pid file").parse().expect("a number");
    let state = stage.state();
    assert_eq!((&state["status"], &state["pid"]), (&json!("running"), &json!(pid)));

    let again = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert_eq!(again.status.code(), Some(1));
    assert!(errors(&again).contains("already exists"), "{}", errors(&again));

    drop(child.stdin.take());
    assert_eq!(child.wait().expect("ends").code(), Some(0));
    assert!(stage.is_clean());
}

#[test]
fn timings_name_every_phase() {
    let stage = Stage::new(&["true"]);
    let path = stage.path().join("timings");
    let output = stage.run(&["--timings", path.to_str().expect("text")]).output().expect("runs");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    let timings: Value = serde_json::from_slice(&fs::read(path).expect("written")).expect("JSON");
    let phases = timings["phases"].as_array().expect("list");
    let names: Vec<_> = phases.iter().map(|phase| phase["name"].as_str().expect("name")).collect();
    assert_eq!(names, ["host set-up", "boot", "agent", "step", "teardown"]);
    assert!(phases.iter().all(|phase| phase["milliseconds"].as_f64().expect("number") >= 0.0));
}

#[test]
fn agent_that_does_not_answer_is_given_up_with_the_console() {
    let stage = Stage::new(&["true"]);
    let lib = stage.path().join("lib");
    fs::create_dir(&lib).expect("made");
    std::os::unix::fs::symlink(crate::stage::lib_dir().join("vmlinux"), lib.join("vmlinux"))
        .expect("linked");
    // As /init it looks for an inittab, asks for Enter on the console, and never calls.
    std::os::unix::fs::symlink("/bin/busybox", lib.join("kiln-agent")).expect("linked");
    let config = stage.path().join("kiln.toml");
    fs::write(&config, "agent_deadline = 12\n").expect("written");
    let mut command = stage.kiln();
    command.arg("--config").arg(config).arg("--lib-dir").arg(lib);
    command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    let output = command.output().expect("kiln runs");
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    for word in [
        "the guest's agent did not answer within 12 s; last phase reached: boot; ",
        "raise agent_deadline in the configuration file",
        "console:\n  ",
    ] {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert!(stage.is_clean());
}

#[test]
fn nothing_is_left_when_the_command_is_killed() {
    let stage = Stage::new(&["sh", "-c", "echo ready; sleep 1000"]);
    let mut child = stage.run(&[]).stdout(Stdio::piped()).spawn().expect("kiln runs");
    wait_for_line(&mut child, "ready");
    child.kill().expect("killed");
    child.wait().expect("reaped");
    eventually("a clean state directory", || stage.is_clean());
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn nothing_is_left_when_the_monitor_is_killed() {
    let stage = Stage::new(&["sh", "-c", "echo ready; sleep 1000"]);
    let mut child =
        stage.run(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kiln runs");
    wait_for_line(&mut child, "ready");
    let state = stage.state();
    let pid = state["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).expect("a pid");
    let monitor = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(monitor, nix::sys::signal::Signal::SIGKILL).expect("killed");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("killed by SIGKILL"), "{}", errors(&output));
    assert!(stage.is_clean());
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn machine_that_loses_a_process_says_which_and_when() {
    let stage = Stage::new(&["sh", "-c", "echo ready; sleep 1000"]);
    let mut child =
        stage.run(&[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("kiln runs");
    wait_for_line(&mut child, "ready");
    let is_fs = |pid: &i32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "kiln-fs\n")
    };
    let processes = processes_of(&stage);
    let fs_process = *processes.iter().find(|pid| is_fs(pid)).expect("kiln fs");
    let fs_process = nix::unistd::Pid::from_raw(fs_process);
    nix::sys::signal::kill(fs_process, nix::sys::signal::Signal::SIGKILL).expect("killed");
    let output = child.wait_with_output().expect("ends");
    assert_eq!(output.status.code(), Some(1));
    let expected = "kiln: file system process was killed by SIGKILL; last phase reached: step; \
                    the host's kernel";
    assert!(errors(&output).contains(expected), "{}", errors(&output));
    assert!(stage.is_clean());
}

#[test]
fn runs_in_a_row_leave_the_host_as_it_was() {
    let stage = Stage::new(&["true"]);
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts").lines().count();
    let before = mounts();
    for _ in 0..5 {
        let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        assert!(stage.is_clean());
        assert!(processes_of(&stage).is_empty(), "processes are left");
    }
    assert_eq!(mounts(), before);
}

#[test]
fn scheduling_personality_and_clocks_are_what_the_bundle_says() {
    let script = "cut -d' ' -f19,41 /proc/self/stat; cat /proc/self/personality; \
                  cat /proc/self/timens_offsets; cut -d. -f1 /proc/uptime";
    let stage = Stage::new(&["/bin/busybox", "sh", "-c", &script.replace("cut", "busybox cut")]);
    stage.edit(|config| {
        config["process"]["scheduler"] = json!({"policy": "SCHED_BATCH", "nice": 5});
        config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_IDLE", "priority": 0});
        config["linux"]["personality"] = json!({"domain": "LINUX"});
        config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}});
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
        namespaces.push(json!({"type": "time"}));
    });
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert!(output.status.success(), "{}", errors(&output));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let lines: Vec<_> = text.lines().map(|line| line.split_whitespace().collect()).collect();
    let [scheduling, personality, _, boottime, uptime]: [Vec<&str>; 5] =
        lines.try_into().unwrap_or_else(|_| panic!("{text}"));
    // SCHED_BATCH of linux/sched.h.
    assert_eq!(scheduling, ["5", "3"], "{text}");
    assert_eq!(personality, ["00000000"], "{text}");
    assert_eq!(boottime, ["boottime", "1000000", "0"], "{text}");
    assert!(uptime[0].parse::<u64>().expect("seconds") >= 1_000_000, "{text}");
}

#[test]
fn sockets_that_systemd_listens_on_are_refused() {
    let stage = Stage::new(&["true"]);
    let kiln = env!("CARGO_BIN_EXE_kiln");
    let run = |pid: &str| {
        let script = format!(
            "LISTEN_FDS=1 LISTEN_PID={pid} exec {kiln} --root {} run -b {} test",
            stage.root().display(),
            stage.bundle().display()
        );
        let mut sh = std::process::Command::new("sh");
        sh.args(["-c", &script]).env("KILN_LIB_DIR", "/no/such").stdin(Stdio::null());
        errors(&sh.output().expect("sh"))
    };
    let refused = run("$$");
    assert!(refused.contains("LISTEN_FDS=1: a guest cannot be given descriptors"), "{refused}");
    // They are another process's, the engine's that started this one.
    let passed = run("1");
    assert!(!passed.contains("LISTEN_FDS") && passed.contains("/no/such"), "{passed}");
    assert!(stage.is_clean());
}
