//! Further processes in a running container.

use std::collections::{BTreeMap, HashSet};
use std::io::{Read, Write};
use std::net::Shutdown;

use kiln_protocol::{ExecId, ExitStatus, FailurePhase, FromAgent, Stdio, ToAgent, WindowSize};
use serde_json::json;

use crate::guest::{Guest, is_started, program, shell, shell_process};
use crate::process::{assert_has_five_sets, five_sets, status_line, with_user_namespace};

const NO_STDIO: Stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };

fn guest_with(config: &serde_json::Value) -> Guest {
    let mut guest = Guest::start();
    guest.run_on(config);
    guest
}

fn sleeping() -> serde_json::Value {
    shell("exec sleep 1000")
}

#[test]
fn status_and_both_outputs_come_back() {
    let mut guest = guest_with(&sleeping());
    for code in [0, 7, 255] {
        let script = format!("echo out; echo err >&2; exit {code}");
        let outcome = guest.exec(&shell_process(&script)).expect("runs");
        assert_eq!(outcome.status, ExitStatus::Code(code));
        assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
    }
    let outcome = guest.exec(&shell_process("kill -TERM $$")).expect("runs");
    assert_eq!(outcome.status, ExitStatus::Signal(libc::SIGTERM as u8));
}

#[test]
fn exec_is_in_all_namespaces_the_cgroup_and_the_root_of_the_container() {
    let mut config = sleeping();
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "time"}));
    config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "12345"});
    for config in [config.clone(), with_user_namespace(config)] {
        let mut guest = guest_with(&config);
        let script = "for n in cgroup ipc mnt net pid time user uts; do \
                        test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo $n; \
                      done; \
                      cat /proc/self/cgroup | grep ^0; test $$ -gt 1 || echo pid; ls -a /; \
                      cut -d. -f1 /proc/uptime; hostname; cat /proc/sys/kernel/msgmax";
        let mut process = shell_process(script);
        // Looking at the first process takes what it has.
        process["capabilities"] = json!({
            "bounding": ["CAP_SYS_PTRACE"], "permitted": ["CAP_SYS_PTRACE"],
            "effective": ["CAP_SYS_PTRACE"],
        });
        let outcome = guest.exec(&process).expect("runs");
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        let root = [".", "..", "bin", "dev", "etc", "proc", "sys", "tmp"];
        assert_eq!(lines[0], "0::/", "{outcome:?}");
        assert_eq!(lines[1..9], root, "{outcome:?}");
        let uptime: u64 = lines[9].parse().expect("a number");
        assert!(uptime >= 1_000_000_000, "{uptime}");
        assert_eq!(lines[10..], ["step", "12345"]);
        guest.kill();
    }
}

#[test]
fn process_object_is_carried_out_as_for_the_first_process() {
    let mut guest = guest_with(&sleeping());
    let mut process = shell_process(
        "id -u; id -g; id -G; umask; echo $HOME; pwd; echo $ANSWER; cat /proc/self/oom_score_adj; \
         cut -d' ' -f19 /proc/self/stat; cat /proc/self/status",
    );
    process["user"] = json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027});
    process["env"] = json!(["PATH=/bin", "ANSWER=42"]);
    process["cwd"] = json!("/tmp");
    process["oomScoreAdj"] = json!(321);
    process["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 5});
    process["capabilities"] = five_sets();
    let stdout = guest.exec(&process).expect("runs").stdout;
    let expected = "1000\n1001\n1001 5 7\n0027\n/home/builder\n/tmp\n42\n321\n5\n";
    assert!(stdout.starts_with(expected), "{stdout}");
    assert_has_five_sets(&stdout);
}

#[test]
fn limits_are_the_execs_own() {
    let mut guest = guest_with(&sleeping());
    for (limits, expected) in
        [(json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]), "77"), (json!([]), "1024")]
    {
        let mut process = shell_process("ulimit -n; grep 'open files' /proc/1/limits");
        process["rlimits"] = limits;
        let stdout = guest.exec(&process).expect("runs").stdout;
        let words: Vec<&str> = stdout.split_whitespace().collect();
        assert_eq!(words[..5], [expected, "Max", "open", "files", "1024"]);
    }
}

#[test]
fn user_of_a_user_namespace_can_use_its_streams() {
    let mut guest = guest_with(&with_user_namespace(sleeping()));
    let script = "id -u; cat /proc/self/uid_map; echo two > /dev/stdout";
    let mut process = shell_process(script);
    process["user"] = json!({"uid": 1000, "gid": 1000});
    let outcome = guest.exec(&process).expect("runs");
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["1000", "0", "200000", "65536", "two"], "{}", outcome.stderr);
}

#[test]
fn filter_of_the_container_holds_for_execs() {
    let mut config = sleeping();
    config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOSPC}]});
    let mut guest = guest_with(&config);
    for no_new_privileges in [true, false] {
        let mut process = shell_process("mkdir /tmp/x; cat /proc/self/status");
        process["noNewPrivileges"] = json!(no_new_privileges);
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let outcome = guest.exec(&process).expect("runs");
        assert!(outcome.stderr.contains("No space left on device"), "{}", outcome.stderr);
        assert_eq!(status_line(&outcome.stdout, "Seccomp"), "2");
        assert_eq!(status_line(&outcome.stdout, "CapPrm"), "0000000000000000");
    }
}

#[test]
fn nothing_of_the_agents_reaches_an_exec() {
    let mut guest = guest_with(&sleeping());
    let mut process = shell_process("");
    process["args"] = json!(["/bin/ls", "/proc/self/fd"]);
    // The fourth is the directory that ls reads.
    assert_eq!(guest.exec(&process).expect("runs").stdout, "0\n1\n2\n3\n");
    process["args"] = json!(["/bin/cat", "/proc/self/status"]);
    let stdout = guest.exec(&process).expect("runs").stdout;
    assert_eq!(status_line(&stdout, "SigBlk"), "0000000000000000");
    assert_eq!(status_line(&stdout, "SigIgn"), "0000000000000000");
}

#[test]
fn other_processes_of_the_container_never_see_descriptors_of_the_agent() {
    // Looks at what each process that comes up has open, as fast as it can.
    let mut config = shell(
        "while test ! -e /tmp/stop; do for p in /proc/[0-9]*; do \
           test $p = /proc/1 || ls -l $p/fd 2>/dev/null | grep -E 'eventpoll|signalfd' >> /seen; \
         done; done; exit 0",
    );
    let capabilities = ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE", "CAP_SYS_ADMIN"];
    config["process"]["capabilities"] = json!({
        "bounding": capabilities, "permitted": capabilities, "effective": capabilities,
    });
    let mut guest = guest_with(&config);
    for _ in 0..20 {
        guest.exec(&shell_process("true")).expect("runs");
    }
    guest.exec(&shell_process("touch /tmp/stop")).expect("runs");
    assert_eq!(guest.wait(), ExitStatus::Code(0));
    let seen = std::fs::read_to_string(guest.rootfs().join("seen")).unwrap_or_default();
    assert_eq!(seen, "");
}

#[test]
fn program_that_cannot_be_executed_has_a_shells_status() {
    use std::os::unix::fs::PermissionsExt;
    let mut guest = Guest::start();
    let rootfs = guest.rootfs();
    std::fs::write(rootfs.join("bin/plain"), "no program").expect("file");
    let strange = rootfs.join("bin/strange");
    std::fs::write(&strange, "\x01\x02\x03").expect("file");
    std::fs::set_permissions(&strange, std::fs::Permissions::from_mode(0o755)).expect("mode");
    guest.run_on(&sleeping());
    let cases = [
        ("nothing", 127, "exec: \"nothing\": executable file not found in $PATH"),
        ("/nothing", 127, "exec: \"/nothing\": stat /nothing: no such file or directory"),
        ("/etc", 126, "exec: \"/etc\": is a directory"),
        ("/bin/plain", 126, "exec: \"/bin/plain\": permission denied"),
        ("/bin/strange", 126, "exec /bin/strange: exec format error"),
    ];
    for (name, exit_code, message) in cases {
        let refusal = guest.exec(&program(&[name])["process"]).expect_err("fails");
        assert_eq!(refusal.message, message);
        assert_eq!((refusal.exit_code, refusal.phase), (exit_code, FailurePhase::Exec));
    }
    assert_eq!(guest.exec(&shell_process("true")).expect("runs").status, ExitStatus::Code(0));
}

#[test]
fn process_that_cannot_be_honoured_is_refused_by_field() {
    let mut guest = guest_with(&sleeping());
    let cases = [
        ("selinuxLabel", json!("x:y:z"), "process.selinuxLabel"),
        ("capabilities", json!({"bounding": ["CAP_NONSENSE"]}), "CAP_NONSENSE"),
        ("args", json!([]), "process.args"),
        ("terminal", json!(true), "process.terminal"),
        ("cwd", json!("/no/such/place"), "process.cwd (/no/such/place)"),
        ("user", json!({"uid": "x"}), "process: "),
    ];
    for (field, value, name) in cases {
        let mut process = shell_process("true");
        process[field] = value;
        let refusal = guest.exec(&process).expect_err("refused");
        assert!(refusal.message.contains(name), "{field}: {}", refusal.message);
        assert_ne!(refusal.exit_code, 0);
    }
}

#[test]
fn exec_before_and_after_the_containers_life_is_refused() {
    let mut guest = Guest::start();
    let refused = |guest: &mut Guest| {
        let refusal = guest.exec(&shell_process("true")).expect_err("refused");
        assert!(refusal.message.contains("does not run"), "{}", refusal.message);
        assert_eq!((refusal.exit_code, refusal.phase), (255, FailurePhase::Exec));
    };
    refused(&mut guest);
    guest.run_on(&sleeping());
    guest.kill();
    refused(&mut guest);
}

#[test]
fn container_that_waits_for_its_start_takes_execs_and_survives_them() {
    let mut guest = Guest::start();
    guest.create(&shell("exit 5"), Vec::new(), NO_STDIO);
    guest.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
    assert_eq!(guest.exec(&shell_process("echo here")).expect("runs").stdout, "here\n");
    guest.start_container();
    guest.expect(|message| matches!(message, FromAgent::Started { .. })).expect("started");
    assert_eq!(guest.wait(), ExitStatus::Code(5));
}

#[test]
fn number_of_an_exec_is_good_for_one() {
    let mut guest = guest_with(&sleeping());
    for (exec, works) in [(ExecId(1), true), (ExecId(1), false), (ExecId(2), true)] {
        guest.send_exec(exec, &shell_process("true"), NO_STDIO);
        match guest.expect(|message| is_started(message, exec)) {
            Ok(()) => {
                assert!(works);
                assert!(matches!(guest.receive(), FromAgent::ExecExited { .. }));
            }
            Err(refusal) => assert!(!works && refusal.message.contains("used before")),
        }
    }
}

#[test]
fn input_reaches_the_program_and_ends() {
    let mut guest = guest_with(&sleeping());
    let (stdin, stdout) = (guest.token(), guest.token());
    let stdio = Stdio::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    guest.send_exec(ExecId(1), &shell_process("cat; echo end"), stdio);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    let (mut input, mut output) = (guest.connect(stdin), guest.connect(stdout));
    input.write_all(b"some input\n").expect("writes");
    input.shutdown(Shutdown::Write).expect("half-close");
    let mut text = String::new();
    output.read_to_string(&mut text).expect("reads");
    assert_eq!(text, "some input\nend\n");
    assert!(matches!(guest.receive(), FromAgent::ExecExited { .. }));
}

#[test]
fn terminals_are_each_execs_own() {
    let mut guest = guest_with(&sleeping());
    let mut terminals = Vec::new();
    for (exec, rows) in [(ExecId(1), 30), (ExecId(2), 40)] {
        let stream = guest.token();
        let script = "trap 'stty size; exit 3' WINCH; tty; stty size; \
                      while :; do sleep 0.05; done";
        let mut process = shell_process(script);
        process["terminal"] = json!(true);
        process["user"] = json!({"uid": 1000, "gid": 1000});
        let size = WindowSize { rows, columns: 100 };
        guest.send_exec(exec, &process, Stdio::Terminal { stream, size });
        guest.expect(|message| is_started(message, exec)).expect("started");
        let mut terminal = guest.connect(stream);
        let expected = format!("/dev/pts/{}\r\n{rows} 100\r\n", terminals.len());
        let mut text = vec![0; expected.len()];
        terminal.read_exact(&mut text).expect("reads");
        assert_eq!(String::from_utf8_lossy(&text), expected);
        terminals.push((exec, terminal));
    }
    for ((exec, mut terminal), rows) in terminals.into_iter().zip(50..) {
        let container = "c".to_owned();
        let size = WindowSize { rows, columns: 90 };
        guest.send(&ToAgent::Resize { container, exec: Some(exec), size });
        let mut rest = String::new();
        terminal.read_to_string(&mut rest).expect("reads");
        assert_eq!(rest, format!("{rows} 90\r\n"));
        match guest.receive() {
            FromAgent::ExecExited { exec: ended, status, .. } => {
                assert_eq!((ended, status), (exec, ExitStatus::Code(3)));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn signal_reaches_the_exec_that_is_named() {
    let mut guest = guest_with(&sleeping());
    for exec in [ExecId(1), ExecId(2)] {
        let script =
            format!("trap 'exit 40' USR1; touch /ready{}; while :; do sleep 0.05; done", exec.0);
        guest.send_exec(exec, &shell_process(&script), NO_STDIO);
        guest.expect(|message| is_started(message, exec)).expect("started");
        while !guest.rootfs().join(format!("ready{}", exec.0)).exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    for (exec, signal, end) in [
        (ExecId(2), libc::SIGUSR1, ExitStatus::Code(40)),
        (ExecId(1), libc::SIGKILL, ExitStatus::Signal(libc::SIGKILL as u8)),
    ] {
        guest.signal(Some(exec), signal, false);
        let expected = FromAgent::ExecExited { container: "c".to_owned(), exec, status: end };
        assert_eq!(guest.receive(), expected);
    }
    // To one that has ended: nothing happens.
    guest.signal(Some(ExecId(1)), libc::SIGKILL, false);
    assert_eq!(guest.exec(&shell_process("true")).expect("runs").status, ExitStatus::Code(0));
}

#[test]
fn end_of_the_container_ends_its_execs_and_is_told_last() {
    let mut guest = guest_with(&sleeping());
    let all: HashSet<u32> = (0..5).collect();
    for exec in &all {
        let exec = ExecId(*exec);
        guest.send_exec(exec, &program(&["/bin/sleep", "1000"])["process"], NO_STDIO);
        guest.expect(|message| is_started(message, exec)).expect("started");
    }
    guest.signal(None, libc::SIGKILL, false);
    let mut ended = HashSet::new();
    while ended.len() < all.len() {
        match guest.receive() {
            FromAgent::ExecExited { exec, status, .. } => {
                assert_eq!(status, ExitStatus::Signal(libc::SIGKILL as u8));
                assert!(ended.insert(exec.0));
            }
            other => panic!("before the execs' ends: {other:?}"),
        }
    }
    assert_eq!(guest.wait(), ExitStatus::Signal(libc::SIGKILL as u8));
    assert_eq!(ended, all);
}

#[test]
fn failure_of_the_container_ends_its_execs_first() {
    use std::os::unix::fs::PermissionsExt;
    let mut guest = Guest::start();
    let strange = guest.rootfs().join("bin/strange");
    std::fs::write(&strange, "\x01\x02\x03").expect("file");
    std::fs::set_permissions(&strange, std::fs::Permissions::from_mode(0o755)).expect("mode");
    guest.create(&program(&["/bin/strange"]), Vec::new(), NO_STDIO);
    guest.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
    guest.send_exec(ExecId(1), &program(&["/bin/sleep", "1000"])["process"], NO_STDIO);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::ExecExited { exec: ExecId(1), .. }));
    let failed = guest.expect(|_| false).expect_err("fails");
    assert_eq!(failed.message, "exec /bin/strange: exec format error");
}

#[test]
fn many_execs_at_once_lose_none_of_their_output() {
    const EXECS: u32 = 40;
    const BYTES: usize = 1 << 20;
    let mut guest = guest_with(&sleeping());
    let mut outputs = BTreeMap::new();
    for exec in 0..EXECS {
        let (stdio, tokens) = guest.outputs();
        let script = format!("head -c {BYTES} /dev/zero | tr '\\0' {}; echo {exec} >&2", exec % 10);
        guest.send_exec(ExecId(exec), &shell_process(&script), stdio);
        outputs.insert(exec, guest.read(tokens));
    }
    let (mut started, mut ended) = (0, 0);
    while ended < EXECS {
        match guest.receive() {
            FromAgent::ExecStarted { .. } => started += 1,
            FromAgent::ExecExited { status: ExitStatus::Code(0), .. } => ended += 1,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(started, EXECS);
    for (exec, outputs) in outputs {
        let outcome = outputs.outcome(ExitStatus::Code(0));
        assert_eq!(outcome.stdout.len(), BYTES, "exec {exec}");
        let digit = char::from_digit(exec % 10, 10).expect("a digit");
        assert!(outcome.stdout.chars().all(|c| c == digit), "exec {exec}");
        assert_eq!(outcome.stderr, format!("{exec}\n"));
    }
}

#[test]
fn writer_waits_for_a_reader_that_does_not_read() {
    let mut guest = guest_with(&sleeping());
    let stdout = guest.token();
    let stdio = Stdio::Pipes { stdin: None, stdout: Some(stdout), stderr: None };
    let script = "head -c 20000000 /dev/zero; touch /written";
    guest.send_exec(ExecId(1), &shell_process(script), stdio);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    let mut output = guest.connect(stdout);
    // Others are served meanwhile.
    for _ in 0..3 {
        assert_eq!(guest.exec(&shell_process("echo other")).expect("runs").stdout, "other\n");
    }
    assert!(!guest.rootfs().join("written").exists());
    let mut bytes = Vec::new();
    output.read_to_end(&mut bytes).expect("reads");
    assert_eq!(bytes.len(), 20_000_000);
    assert!(matches!(guest.receive(), FromAgent::ExecExited { .. }));
}

#[test]
fn shutdown_with_execs_leaves_nothing() {
    let mut guest = guest_with(&sleeping());
    guest.send_exec(ExecId(1), &program(&["/bin/sleep", "1000"])["process"], NO_STDIO);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    drop(guest);
}
