//! Hooks that run in the container.

use kiln_protocol::{ExitStatus, FailurePhase, FromAgent, Stdio};
use serde_json::{Value, json};

use crate::guest::{Guest, shell, shell_process};

const NO_STDIO: Stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };

fn hook(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin", "A=b"]})
}

fn with_hooks(mut config: Value, hooks: Value) -> Value {
    config["hooks"] = hooks;
    config
}

fn read(guest: &Guest, name: &str) -> String {
    let path = guest.rootfs().join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

#[test]
fn hooks_run_at_their_moments_in_order_with_the_state() {
    let mut guest = Guest::start();
    let config = with_hooks(
        shell("echo program >> /order"),
        json!({
            "createContainer": [
                hook("cat > /state-create; echo create 0 $A $PWD >> /order; env > /environment"),
                hook("echo create 1 >> /order"),
            ],
            "startContainer": [hook("cat > /state-start; echo start >> /order")],
        }),
    );
    guest.create(&config, Vec::new(), NO_STDIO);
    guest.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
    assert_eq!(read(&guest, "order"), "create 0 b /\ncreate 1\n");
    guest.start_container();
    guest.expect(|message| matches!(message, FromAgent::Started { .. })).expect("started");
    assert_eq!(guest.wait(), ExitStatus::Code(0));
    assert_eq!(read(&guest, "order"), "create 0 b /\ncreate 1\nstart\nprogram\n");
    // The shell adds the others.
    let known = ["PATH=/bin", "A=b", "PWD=/", "SHLVL=1", "OLDPWD=/"];
    for variable in read(&guest, "environment").lines() {
        assert!(known.contains(&variable), "{variable}");
    }
    for (name, status) in [("state-create", "creating"), ("state-start", "created")] {
        let state: Value = serde_json::from_str(&read(&guest, name)).expect("JSON");
        let expected = json!({"ociVersion": "1.2.0", "id": "c", "bundle": "/bundle",
            "status": status, "pid": 1});
        assert_eq!(state, expected);
    }
}

#[test]
fn hooks_are_in_the_containers_namespaces() {
    let mut guest = Guest::start();
    let list = "for n in cgroup ipc mnt net pid uts; do readlink /proc/self/ns/$n; done";
    let script = |name: &str| {
        let mounts = format!("grep -q ' /dev/shm ' /proc/self/mounts || echo no mounts >> /{name}");
        hook(&format!("{list} > /{name}; {mounts}"))
    };
    let config = with_hooks(
        shell(&format!("{list} > /own")),
        json!({"createContainer": [script("create")], "startContainer": [script("start")]}),
    );
    assert_eq!(guest.run(&config).status, ExitStatus::Code(0));
    let own = read(&guest, "own");
    assert_eq!(own.lines().count(), 6);
    assert_eq!(read(&guest, "start"), own);
    assert_eq!(read(&guest, "create"), own);
}

#[test]
fn hook_before_the_program_is_confined_as_that_is() {
    let mut guest = Guest::start();
    std::fs::create_dir(guest.rootfs().join("open")).expect("directory");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(guest.rootfs().join("open"), open).expect("mode");
    let script = |name: &str| {
        format!(
            "id -u > /open/{name}; mkdir /open/x 2>> /open/{name}; \
             grep -E '^(Cap|Seccomp:|NoNewPrivs)' /proc/self/status >> /open/{name}"
        )
    };
    for no_new_privileges in [true, false] {
        let hooks = json!({"startContainer": [hook(&script("hook"))]});
        let mut config = with_hooks(shell(&script("program")), hooks);
        config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        config["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]});
        assert_eq!(guest.run(&config).status, ExitStatus::Code(0));
        let hook = read(&guest, "open/hook");
        assert_eq!(hook, read(&guest, "open/program"));
        assert!(hook.starts_with("1000\n") && hook.contains("No space left"), "{hook}");
    }
}

#[test]
fn failure_of_a_hook_ends_create_or_start_by_its_name() {
    let mut guest = Guest::start();
    let mut timed = hook("echo waiting; sleep 1000");
    timed["timeout"] = json!(1);
    let mut signalled = hook("kill -KILL $$");
    signalled["timeout"] = json!(100);
    let cases = [
        (hook("echo why >&2; exit 3"), "[1]: /bin/sh: exit status: 3; its output ends with: why"),
        (timed, "[1]: /bin/sh: did not end within its timeout of 1 s; its output ends with: wait"),
        (signalled, "[1]: /bin/sh: signal: 9 (SIGKILL)"),
        (json!({"path": "/etc/passwd"}), "[1]: /etc/passwd: exit status: 126"),
        (json!({"path": "/usr/bin/nowhere"}), "[1]: /usr/bin/nowhere: "),
    ];
    for kind in ["createContainer", "startContainer"] {
        for (failing, message) in &cases {
            let config = with_hooks(shell("touch /ran"), json!({kind: [hook("true"), failing]}));
            let refusal = guest.fail(&config);
            let expected = format!("hooks.{kind}{message}");
            assert!(refusal.message.starts_with(&expected), "{}", refusal.message);
            assert_eq!((refusal.phase, refusal.exit_code), (FailurePhase::Hooks, 1));
            assert!(!guest.rootfs().join("ran").exists());
        }
    }
}

#[test]
fn hook_that_only_the_host_has_is_refused_with_the_reason() {
    let mut guest = Guest::start();
    // It is on this machine, but not in the container.
    let hooks = json!({"createContainer": [{"path": "/usr/bin/env"}]});
    let refusal = guest.fail(&with_hooks(shell("true"), hooks));
    let reason = "files of the host are not in the guest";
    assert!(refusal.message.starts_with("hooks.createContainer[0]: /usr/bin/env"));
    assert!(refusal.message.contains(reason), "{}", refusal.message);
}

#[test]
fn execs_run_no_hooks() {
    let mut guest = Guest::start();
    let config = with_hooks(
        shell("exec sleep 1000"),
        json!({"startContainer": [hook("echo once >> /tmp/count")]}),
    );
    guest.run_on(&config);
    guest.exec(&shell_process("true")).expect("runs");
    assert_eq!(read(&guest, "tmp/count"), "once\n");
    guest.kill();
}
