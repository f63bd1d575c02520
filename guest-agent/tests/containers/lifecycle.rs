//! Creating, starting, signalling, ending.

use kiln_protocol::{ExitStatus, FailurePhase, FromAgent, Stdio, ToAgent};
use serde_json::json;

use crate::guest::{Guest, program, shell};

const NO_STDIO: Stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };

#[test]
fn status_and_output_of_a_program_come_back() {
    let mut guest = Guest::start();
    let outcome = guest.run(&shell("echo out; echo err >&2; exit 7"));
    assert_eq!(outcome.status, ExitStatus::Code(7));
    assert_eq!((outcome.stdout.as_str(), outcome.stderr.as_str()), ("out\n", "err\n"));
}

#[test]
fn containers_can_follow_each_other() {
    let mut guest = Guest::start();
    for round in 0..3 {
        let outcome = guest.run(&shell(&format!("exit {round}")));
        assert_eq!(outcome.status, ExitStatus::Code(round));
    }
}

#[test]
fn program_waits_for_the_word_to_start() {
    let mut guest = Guest::start();
    guest.create(&shell("touch /started"), Vec::new(), NO_STDIO);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    assert!(!guest.rootfs().join("started").exists());
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    assert_eq!(guest.wait(), ExitStatus::Code(0));
    assert!(guest.rootfs().join("started").exists());
}

#[test]
fn signal_ends_a_program_and_is_reported() {
    let mut guest = Guest::start();
    let script = "trap 'exit 40' USR1; touch /ready; while :; do sleep 0.05; done";
    guest.create(&shell(script), Vec::new(), NO_STDIO);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    while !guest.rootfs().join("ready").exists() {
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let container = "c".to_owned();
    guest.send(&ToAgent::Signal { container, exec: None, signal: libc::SIGUSR1, all: false });
    assert_eq!(guest.wait(), ExitStatus::Code(40));
}

#[test]
fn killing_all_ends_a_container_before_and_after_its_start() {
    for started in [false, true] {
        let mut guest = Guest::start();
        guest.create(&shell("sleep 1000 & sleep 1000"), Vec::new(), NO_STDIO);
        assert!(matches!(guest.receive(), FromAgent::Created { .. }));
        if started {
            guest.start_container();
            assert!(matches!(guest.receive(), FromAgent::Started { .. }));
        }
        let container = "c".to_owned();
        guest.send(&ToAgent::Signal { container, exec: None, signal: libc::SIGKILL, all: true });
        assert_eq!(guest.wait(), ExitStatus::Signal(libc::SIGKILL as u8));
    }
}

#[test]
fn descendants_die_with_the_first_process_and_output_ends() {
    let mut guest = Guest::start();
    let outcome = guest.run(&shell("(sleep 1000; echo late) & echo early"));
    assert_eq!(outcome.stdout, "early\n");
    assert_eq!(outcome.status, ExitStatus::Code(0));
}

#[test]
fn program_that_cannot_be_executed_has_a_shells_status() {
    let mut guest = Guest::start();
    let rootfs = guest.rootfs();
    std::fs::write(rootfs.join("bin/plain"), "no program").expect("file");
    let cases = [
        ("nothing", 127, "exec: \"nothing\": executable file not found in $PATH"),
        ("/nothing", 127, "exec: \"/nothing\": stat /nothing: no such file or directory"),
        ("/etc", 126, "exec: \"/etc\": is a directory"),
        ("/bin/plain", 126, "exec: \"/bin/plain\": permission denied"),
    ];
    for (name, exit_code, message) in cases {
        let refusal = guest.fail(&program(&[name]));
        assert_eq!(refusal.message, message);
        assert_eq!((refusal.exit_code, refusal.phase), (exit_code, FailurePhase::Exec));
    }
}

#[test]
fn file_of_no_known_format_fails_when_started() {
    use std::os::unix::fs::PermissionsExt;
    let mut guest = Guest::start();
    let path = guest.rootfs().join("bin/strange");
    std::fs::write(&path, "\x01\x02\x03").expect("file");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
    let refusal = guest.fail(&program(&["/bin/strange"]));
    assert_eq!(refusal.message, "exec /bin/strange: exec format error");
    assert_eq!((refusal.exit_code, refusal.phase), (126, FailurePhase::Exec));
}

#[test]
fn fields_that_cannot_be_honoured_are_refused_by_name() {
    let mut guest = Guest::start();
    let cases = [
        ("/linux/intelRdt", json!({"closID": "x"}), "linux.intelRdt"),
        ("/process/selinuxLabel", json!("x:y:z"), "process.selinuxLabel"),
        ("/process/apparmorProfile", json!("custom"), "process.apparmorProfile"),
        (
            "/hooks",
            json!({"startContainer": [{"path": "bin/true"}]}),
            "hooks.startContainer[0].path",
        ),
        (
            "/hooks",
            json!({"createContainer": [{"path": "/x", "timeout": 0}]}),
            "hooks.createContainer[0].timeout",
        ),
        ("/linux/seccomp", json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "linux.seccomp.default"),
        ("/linux/sysctl", json!({"vm.swappiness": "1"}), "vm.swappiness"),
        ("/linux/rootfsPropagation", json!("upwards"), "linux.rootfsPropagation"),
        ("/process/capabilities", json!({"bounding": ["CAP_NONSENSE"]}), "CAP_NONSENSE"),
        ("/linux/resources", json!({"memory": {"disableOOMKiller": true}}), "disableOOMKiller"),
    ];
    for (pointer, value, name) in cases {
        let mut config = shell("true");
        let (parent, field) = pointer.rsplit_once('/').expect("a pointer");
        let parent = config.pointer_mut(parent).expect("parent");
        parent[field] = value;
        let refusal = guest.fail(&config);
        assert!(refusal.message.contains(name), "{pointer}: {}", refusal.message);
        assert_eq!(refusal.phase, FailurePhase::Config, "{pointer}");
    }
}

#[test]
fn no_process_or_mount_of_the_agent_is_visible() {
    let mut guest = Guest::start();
    let script = "ls /proc | grep -c '^[0-9]'; grep -c mount-point /proc/self/mountinfo; cat /proc/self/cgroup";
    let outcome = guest.run(&shell(script));
    let lines: Vec<&str> = outcome.stdout.lines().collect();
    let processes: u32 = lines[0].parse().expect("a number");
    assert!(processes <= 4, "{processes} processes");
    assert_eq!(lines[1], "0");
    assert!(lines[2..].contains(&"0::/"), "{lines:?}");
}
