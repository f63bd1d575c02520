//! `kiln exec`: further programs in a container that runs.

use std::fs;
use std::io::{IoSliceMut, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::lifecycle::{create, succeeds, wait_for};
use crate::run::{eventually, wait_for_line};
use crate::stage::{Stage, errors};
use crate::terminal::{Screen, User, give_terminals, size};

/// A stage whose container runs.
pub fn running(args: &[&str]) -> Stage {
    let stage = Stage::new(args);
    start(&stage);
    stage
}

/// Creates and starts the container `test`.
pub fn start(stage: &Stage) {
    let created = create(stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(stage, &["start", "test"]);
}

/// `kiln exec` in the container `test`, of `args` behind these options.
pub fn exec(stage: &Stage, options: &[&str], args: &[&str]) -> Command {
    let mut command = stage.kiln();
    command.arg("exec").args(options).arg("test").args(args);
    command
}

fn output(stage: &Stage, options: &[&str], args: &[&str]) -> Output {
    exec(stage, options, args).stdin(Stdio::null()).output().expect("kiln")
}

/// What a program that succeeds wrote.
pub fn said(stage: &Stage, options: &[&str], args: &[&str]) -> String {
    let output = output(stage, options, args);
    assert!(output.status.success(), "{args:?}: {}", errors(&output));
    String::from_utf8(output.stdout).expect("text")
}

fn refused(stage: &Stage, options: &[&str], args: &[&str], code: i32, words: &str) {
    let output = output(stage, options, args);
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(code), "{options:?} {args:?}: {errors}");
    assert!(errors.starts_with("kiln: exec failed: ") && errors.contains(words), "{errors}");
    assert_eq!(errors.lines().count(), 1, "{errors}");
}

/// Waits until a file is there; gives the pid in it.
fn pid_in(path: &Path) -> Pid {
    eventually("the pid file", || path.exists());
    Pid::from_raw(fs::read_to_string(path).expect("pid file").parse().expect("a number"))
}

/// The status of a process that was left to this one.
fn reaped(pid: Pid) -> i32 {
    let mut status = 0;
    // SAFETY: the pointer is to a live integer.
    assert_eq!(unsafe { libc::waitpid(pid.as_raw(), &raw mut status, 0) }, pid.as_raw());
    status
}

/// Has processes that outlive their parents left to this one.
fn become_subreaper() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) };
}

#[test]
fn programs_run_beside_the_containers_own() {
    let stage = running(&["sleep", "1000"]);

    assert_eq!(said(&stage, &[], &["sh", "-c", "echo hello; echo world >&2"]), "hello\n");
    let status = output(&stage, &[], &["sh", "-c", "exit 7"]).status;
    assert_eq!(status.code(), Some(7));
    let status = output(&stage, &[], &["sh", "-c", "kill -TERM $$"]).status;
    assert_eq!(status.code(), Some(128 + 15));
    refused(&stage, &[], &["nosuch"], 127, "executable file not found in $PATH");
    refused(&stage, &[], &["/proc/version"], 126, "permission denied");

    // What follows the program belongs to it.
    assert_eq!(said(&stage, &[], &["sh", "-c", "echo $0 $1", "-d", "--tty"]), "-d --tty\n");
    let script = "echo $(id -u) $(id -g) $(id -G) $PWD $A $PATH; grep -c 'NoNewPrivs:.1' \
                  /proc/self/status";
    let options = ["-u", "12:34", "-g", "56", "--cwd", "/tmp", "-e", "A=b", "--no-new-privs"];
    let told = said(&stage, &options, &["busybox", "sh", "-c", script]);
    assert_eq!(told, "12 34 34 56 /tmp b /bin\n1\n");

    let process = stage.path().join("process.json");
    let file = ["--process", process.to_str().expect("text")];
    let of_file = |value: Value| fs::write(&process, value.to_string()).expect("written");
    let user = json!({"uid": 5, "gid": 6});
    of_file(json!({
        "args": ["sh", "-c", "id -u; pwd"], "cwd": "/etc", "user": user, "env": ["PATH=/bin"],
    }));
    assert_eq!(said(&stage, &file, &[]), "5\n/etc\n");
    fs::write(&process, "{\n \"args\": }\n").expect("written");
    refused(&stage, &file, &[], 255, "process.json: expected value at line 2 column 10");
    of_file(json!({"args": ["true"], "cwd": "/", "user": user, "nosuch": 1}));
    refused(&stage, &file, &[], 255, "process.nosuch: not supported");
    of_file(json!({
        "args": ["true"], "cwd": "/", "user": user, "env": ["PATH=/bin"],
        "rlimits": [{"type": "RLIMIT_NOSUCH", "hard": 1, "soft": 1}],
    }));
    refused(&stage, &file, &[], 255, "RLIMIT_NOSUCH");

    refused(&stage, &[], &[], 255, "process.args: empty");
    refused(&stage, &["--cwd", "tmp"], &["true"], 255, "process.cwd: \"tmp\"");
    refused(&stage, &["--apparmor", "x"], &["true"], 255, "--apparmor=x: ");
    refused(&stage, &["--process-label", "x"], &["true"], 255, "--process-label=x: ");
    refused(&stage, &["--preserve-fds", "1"], &["true"], 255, "--preserve-fds=1: ");
    refused(&stage, &["--tty"], &["true"], 255, "standard input is not a terminal");
    let no_socket = "cannot allocate tty if kiln will detach without setting console socket";
    refused(&stage, &["--tty", "--detach"], &["true"], 255, no_socket);

    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    refused(&stage, &[], &["true"], 255, "cannot exec in a stopped container");
    succeeds(&stage, &["delete", "test"]);
    refused(&stage, &[], &["true"], 255, "container does not exist: \"test\"");
    assert!(stage.is_clean());
}

#[test]
fn programs_run_before_the_containers_own() {
    let stage = Stage::new(&["sleep", "1000"]);
    assert!(create(&stage, &[]).status.success());
    assert_eq!(said(&stage, &[], &["sh", "-c", "echo before"]), "before\n");
    assert_eq!(stage.state()["status"], "created");
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn standard_streams_are_whole_and_end() {
    let stage = running(&["sleep", "1000"]);
    let spawn = |args: &[&str]| {
        let mut command = exec(&stage, &[], args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().expect("kiln")
    };

    let input: Vec<u8> =
        (0..1u32 << 20).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut child = spawn(&["cat"]);
    let (mut stdin, written) = (child.stdin.take().expect("a pipe"), input.clone());
    let writer = std::thread::spawn(move || stdin.write_all(&written));
    let output = child.wait_with_output().expect("ends");
    writer.join().expect("joins").expect("all was taken");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(output.stdout == input, "{} of {} bytes", output.stdout.len(), input.len());

    // The end of input is an end to the program, which may still write.
    let mut child = spawn(&["sh", "-c", "cat; echo end; echo error >&2; exit 3"]);
    child.stdin.take().expect("a pipe").write_all(b"in ").expect("written");
    let output = child.wait_with_output().expect("ends");
    assert_eq!((output.status.code(), &output.stdout[..]), (Some(3), &b"in end\n"[..]));
    assert_eq!(errors(&output), "error\n");

    let mut command = exec(&stage, &[], &["sh", "-c", "cat; echo closed"]);
    // SAFETY: only a system call is made.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, || {
            libc::close(0);
            Ok(())
        })
    };
    let output = command.output().expect("kiln");
    assert_eq!(&output.stdout[..], b"closed\n", "{}", errors(&output));

    // A reader that goes away ends the writer.
    let mut child = spawn(&["sh", "-c", "yes; echo $? >/status"]);
    wait_for_line(&mut child, "y");
    drop(child.stdout.take());
    child.wait().expect("ends");
    let status = fs::read_to_string(stage.rootfs().join("status")).expect("yes has ended");
    assert_ne!(status.trim(), "0");

    // Output of what ends with the container is not lost.
    let child = spawn(&["sh", "-c", "trap '' TERM; head -c 300000 /dev/zero; sleep 2000"]);
    let reader = std::thread::spawn(|| child.wait_with_output());
    eventually("the end of its output", || count(&stage, "^sleep 200[0]") == 1);
    succeeds(&stage, &["kill", "test", "KILL"]);
    let output = reader.join().expect("joins").expect("ends");
    assert_eq!((output.status.code(), output.stdout.len()), (Some(137), 300_000));
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn many_programs_begin_at_once() {
    let stage = running(&["sleep", "1000"]);
    let begun: Vec<Child> = (0..40)
        .map(|number| {
            let script = format!("echo {number}; echo error {number} >&2");
            let mut command = exec(&stage, &[], &["sh", "-c", &script]);
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().expect("kiln")
        })
        .collect();
    for (number, child) in begun.into_iter().enumerate() {
        let output = child.wait_with_output().expect("ends");
        assert_eq!(errors(&output), format!("error {number}\n"));
        assert_eq!(output.stdout, format!("{number}\n").as_bytes());
    }
    succeeds(&stage, &["delete", "--force", "test"]);
}

/// How many processes of the guest have this in their command line. The pattern is not to match
/// itself: that is in one too.
fn count(stage: &Stage, pattern: &str) -> usize {
    let script = format!(
        "for p in /proc/[0-9]*; do busybox tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null | \
         busybox grep -c '{pattern}' || true"
    );
    said(stage, &[], &["sh", "-c", &script]).trim().parse().expect("a number")
}

#[test]
fn process_on_the_host_stands_for_the_program() {
    become_subreaper();
    let stage = running(&["sleep", "1000"]);
    let pid_file = stage.path().join("exec.pid");
    let with_file = ["--pid-file", pid_file.to_str().expect("text")];
    let detached = ["--detach", with_file[0], with_file[1]];
    let detach = |script: &str| {
        let _ = fs::remove_file(&pid_file);
        let mut command = exec(&stage, &detached, &["sh", "-c", script]);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(command.status().expect("kiln").success());
        Pid::from_raw(fs::read_to_string(&pid_file).expect("pid file").parse().expect("a pid"))
    };

    // Whoever is left with the process reads the status from it.
    assert_eq!(libc::WEXITSTATUS(reaped(detach("exit 9"))), 9);
    assert_eq!(libc::WEXITSTATUS(reaped(detach("kill -USR1 $$"))), 128 + 10);

    // A signal to it is one to the program.
    let pid = detach("trap 'exit 5' TERM; >/ready; while :; do sleep 0.1; done");
    eventually("the trap", || stage.rootfs().join("ready").exists());
    kill(pid, Signal::SIGTERM).expect("sent");
    assert_eq!(libc::WEXITSTATUS(reaped(pid)), 5);

    // Its death is the program's.
    let pid = detach("while :; do sleep 0.123; done");
    assert_ne!(count(&stage, "0.[1]23"), 0);
    kill(pid, Signal::SIGKILL).expect("sent");
    assert_eq!(libc::WTERMSIG(reaped(pid)), 9);
    eventually("the program's end", || count(&stage, "0.[1]23") == 0);

    // A program that isn't found leaves no process and no pid file.
    let _ = fs::remove_file(&pid_file);
    refused(&stage, &detached, &["nosuch"], 127, "executable file not found in $PATH");
    assert!(!pid_file.exists());

    // A foreground exec is cancelled by SIGKILL to the pid in its file,
    let _ = fs::remove_file(&pid_file);
    let mut child =
        exec(&stage, &with_file, &["sleep", "1001"]).stdin(Stdio::null()).spawn().expect("kiln");
    let pid = pid_in(&pid_file);
    assert_eq!(count(&stage, "100[1]"), 1);
    kill(pid, Signal::SIGKILL).expect("sent");
    assert_eq!(child.wait().expect("ends").code(), Some(137));
    eventually("the program's end", || count(&stage, "100[1]") == 0);
    // and by its own death,
    let _ = fs::remove_file(&pid_file);
    let mut child =
        exec(&stage, &with_file, &["sleep", "1002"]).stdin(Stdio::null()).spawn().expect("kiln");
    let pid = pid_in(&pid_file);
    assert_eq!(count(&stage, "100[2]"), 1);
    child.kill().expect("killed");
    assert_eq!(child.wait().expect("ends").signal(), Some(9));
    reaped(pid);
    eventually("the program's end", || count(&stage, "100[2]") == 0);
    // and passes signals on.
    let script = "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.1; done";
    let mut child = exec(&stage, &[], &["sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("kiln");
    wait_for_line(&mut child, "ready");
    signal(&child, Signal::SIGINT);
    wait_for_line(&mut child, "caught");
    assert_eq!(child.wait().expect("ends").code(), Some(4));

    // The end of the monitor is everybody's.
    let pid = detach("sleep 1003");
    let monitor = stage.state()["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
    let monitor = Pid::from_raw(monitor.expect("a pid"));
    kill(monitor, Signal::SIGKILL).expect("sent");
    assert_eq!(libc::WEXITSTATUS(reaped(pid)), 137);
    reaped(monitor);
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

fn signal(child: &Child, signal: Signal) {
    let pid = Pid::from_raw(child.id().try_into().expect("a pid"));
    kill(pid, signal).expect("sent");
}

/// The descriptor that comes over a socket, and the words that come with it.
pub fn accept_descriptor(listener: &UnixListener) -> (OwnedFd, String) {
    let (connection, _) = listener.accept().expect("connected");
    let mut words = [0; 256];
    let mut space = nix::cmsg_space!(RawFd);
    let mut parts = [IoSliceMut::new(&mut words)];
    let flags = MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(connection.as_raw_fd(), &mut parts, Some(&mut space), flags)
        .expect("received");
    let length = received.bytes;
    let Some(ControlMessageOwned::ScmRights(fds)) = received.cmsgs().expect("whole").next() else {
        panic!("no descriptor came")
    };
    // SAFETY: the kernel has just made it for this process.
    let descriptor = unsafe { OwnedFd::from_raw_fd(fds[0]) };
    (descriptor, String::from_utf8_lossy(&words[..length]).into_owned())
}

#[test]
fn terminals_go_over_the_console_socket_or_are_the_callers_own() {
    become_subreaper();
    let stage = Stage::new(&["sleep", "1000"]);
    give_terminals(&stage);
    stage.edit(|config| config["process"]["consoleSize"] = json!({"height": 20, "width": 70}));
    start(&stage);
    let socket = stage.path().join("console");
    let listener = UnixListener::bind(&socket).expect("listens");
    let pid_file = stage.path().join("exec.pid");
    // A signal just before the shell waits for a line is seen after the wait, which therefore ends.
    let script = "trap 'echo size $(stty size)' WINCH; tty; stty size; \
                  while :; do read -t 1 line && [ \"$line\" = end ] && exit 9; done";
    let options = [
        "--detach",
        "--tty",
        "--console-socket",
        socket.to_str().expect("text"),
        "--pid-file",
        pid_file.to_str().expect("text"),
    ];
    let mut command = exec(&stage, &options, &["busybox", "sh", "-c", script]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut command = command.spawn().expect("kiln");
    let (master, name) = accept_descriptor(&listener);
    assert!(name.starts_with("/dev/pts/"), "{name}");
    assert!(command.wait().expect("ends").success());
    let pid = pid_in(&pid_file);
    let mut screen = Screen::new(master);
    screen.see("/dev/pts/0\r\n20 70\r\n");
    screen.resize(&size(40, 90));
    screen.see("size 40 90");
    screen.write("end\r");
    assert_eq!(libc::WEXITSTATUS(reaped(pid)), 9);

    let mut user = User::call(exec(&stage, &["-t"], &["sh", "-c", script]), size(33, 111));
    user.screen.see("33 111\r\n");
    assert!(!user.echoes(), "the terminal is in raw mode");
    user.screen.resize(&size(41, 91));
    user.screen.see("size 41 91");
    user.screen.write("end\r");
    assert_eq!(user.kiln.wait().expect("ends").code(), Some(9));
    assert!(user.echoes(), "the terminal is as it was");
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}
