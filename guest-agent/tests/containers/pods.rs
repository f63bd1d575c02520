//! Several containers in one guest, some of which live in the namespaces of the first.

use kiln_protocol::{
    BindMount, ExecId, ExecProcess, FailurePhase, FromAgent, Joined, Stdio, ToAgent,
};
use serde_json::Value;

use crate::guest::{Guest, Outputs, make_rootfs, shell, shell_process};

const SANDBOX: &str = "c";

/// All that a pod's containers have in common.
fn joined() -> Joined {
    let container = SANDBOX.to_owned();
    Joined { container, network: true, ipc: true, uts: true, processes: None }
}

/// A guest with a pod's sandbox, and a root file system for a second container.
fn pod() -> Guest {
    let mut guest = Guest::start();
    make_rootfs(&guest.directory.path().join("share/containers/7"));
    guest.run_on(&shell("exec sleep 1000"));
    guest
}

fn names(container: &str) -> impl Fn(&FromAgent) -> bool + '_ {
    move |message| message.container() == Some(container)
}

fn without_hostname(mut config: Value) -> Value {
    config.as_object_mut().expect("an object").remove("hostname");
    config
}

/// Creates and starts a container of the pod.
fn begin(guest: &mut Guest, name: &str, config: &Value, binds: Vec<BindMount>) -> Outputs {
    begin_in(guest, name, joined(), (config, binds))
}

/// As [`begin`], in the PID namespace of another.
fn begin_among(guest: &mut Guest, name: &str, script: &str, others: &str) -> Outputs {
    let joined = Joined { processes: Some(others.to_owned()), ..joined() };
    begin_in(guest, name, joined, (&without_hostname(shell(script)), Vec::new()))
}

fn begin_in(
    guest: &mut Guest,
    name: &str,
    joined: Joined,
    (config, binds): (&Value, Vec<BindMount>),
) -> Outputs {
    let (stdio, outputs) = guest.outputs();
    guest.create_in(name, "containers/7", Some(joined), (config, binds, stdio));
    let created = |message: &FromAgent| matches!(message, FromAgent::Created { .. });
    guest.expect(|message| names(name)(message) && created(message)).expect("created");
    let outputs = guest.read(outputs);
    guest.send(&ToAgent::Start { container: name.to_owned(), network: None });
    let started = |message: &FromAgent| matches!(message, FromAgent::Started { .. });
    guest.expect(|message| names(name)(message) && started(message)).expect("started");
    outputs
}

/// Waits for the end of a container.
fn end(guest: &mut Guest, name: &str, outputs: Outputs) -> (kiln_protocol::ExitStatus, String) {
    match guest.receive() {
        FromAgent::Exited { container, status, .. } if container == name => {
            let outcome = outputs.outcome(status);
            (outcome.status, outcome.stdout + &outcome.stderr)
        }
        other => panic!("instead of the end of {name}: {other:?}"),
    }
}

const NAMESPACES: &str = "for kind in net ipc uts pid mnt cgroup; do
    echo $kind $(readlink /proc/self/ns/$kind); done";

#[test]
fn containers_of_a_pod_have_its_namespaces_and_their_own() {
    let mut guest = pod();
    let of_sandbox = guest.exec(&shell_process(NAMESPACES)).expect("runs").stdout;
    let config = without_hostname(shell(&format!("{NAMESPACES}; hostname")));
    let outputs = begin(&mut guest, "second", &config, Vec::new());
    let (status, text) = end(&mut guest, "second", outputs);
    assert_eq!(status, kiln_protocol::ExitStatus::Code(0), "{text}");
    let line = |of: &str, kind: &str| {
        let found = of.lines().find(|line| line.starts_with(kind)).map(str::to_owned);
        found.expect("a line of each namespace")
    };
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(line(&text, kind), line(&of_sandbox, kind));
    }
    for kind in ["pid", "mnt", "cgroup"] {
        assert_ne!(line(&text, kind), line(&of_sandbox, kind));
    }
    assert!(text.ends_with("step\n"), "{text}");
    guest.kill();
}

#[test]
fn containers_have_files_execs_and_signals_of_their_own() {
    let mut guest = pod();
    std::fs::write(guest.directory.path().join("share/containers/7/mark"), "second\n")
        .expect("file");
    std::fs::create_dir_all(guest.directory.path().join("share/volumes/3")).expect("directory");
    std::fs::write(guest.directory.path().join("share/volumes/3/file"), "shared\n").expect("file");
    let mut config = shell("cat /mark /volume/file; exec sleep 1000");
    let mounts = config["mounts"].as_array_mut().expect("mounts");
    mounts.push(serde_json::json!({
        "destination": "/volume", "type": "bind", "source": "/x", "options": ["rbind"],
    }));
    let bind = BindMount { mount: mounts.len() - 1, path: "volumes/3".to_owned(), is_file: false };
    let outputs = begin(&mut guest, "second", &config, vec![bind]);

    // Both containers' execs may have the same number.
    let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
    for (name, script) in [("c", "test ! -e /mark"), ("second", "test -e /mark")] {
        let process = serde_json::value::to_raw_value(&shell_process(script)).expect("JSON");
        let (container, exec, stdio) = (name.to_owned(), ExecId(5), stdio.clone());
        guest.send(&ToAgent::Exec(Box::new(ExecProcess { container, exec, process, stdio })));
        let started = |message: &FromAgent| matches!(message, FromAgent::ExecStarted { .. });
        guest.expect(|message| names(name)(message) && started(message)).expect("started");
        match guest.receive() {
            FromAgent::ExecExited { container, status, .. } => {
                assert_eq!((container.as_str(), status.in_shell()), (name, 0));
            }
            other => panic!("{other:?}"),
        }
    }

    let container = "second".to_owned();
    guest.send(&ToAgent::Signal { container, exec: None, signal: libc::SIGKILL, all: false });
    let (status, text) = end(&mut guest, "second", outputs);
    assert_eq!((status.in_shell(), text.as_str()), (137, "second\nshared\n"));
    assert_eq!(guest.exec(&shell_process("echo lives")).expect("runs").stdout, "lives\n");

    // Its name is free again.
    let outputs = begin(&mut guest, "second", &shell("exit 3"), Vec::new());
    assert_eq!(end(&mut guest, "second", outputs).0.in_shell(), 3);
    guest.kill();
}

/// How many processes have this in their command line, as the sandbox sees it. Those that have ended
/// have none.
fn seen_by_sandbox(guest: &mut Guest, words: &str) -> String {
    let script =
        format!("cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -o '[s]leep {words}' | wc -l");
    guest.exec(&shell_process(&script)).expect("runs").stdout
}

/// Waits until the sandbox sees so many: a script is there before the program that it executes.
fn until_seen(guest: &mut Guest, words: &str, count: u32) {
    while seen_by_sandbox(guest, words) != format!("{count}\n") {}
}

#[test]
fn container_in_the_pid_namespace_of_another_ends_with_all_that_is_its_own() {
    let mut guest = pod();
    let script = "tr '\\0' ' ' < /proc/1/cmdline; echo; (sleep 771; true) & sleep 771 &
        read line < /proc/self/stat; [ $$ != 1 ] && echo other; exit 3";
    let outputs = begin_among(&mut guest, "second", script, SANDBOX);
    let (status, text) = end(&mut guest, "second", outputs);
    assert_eq!((status.in_shell(), text.as_str()), (3, "sleep 1000 \nother\n"));
    assert_eq!(seen_by_sandbox(&mut guest, "771"), "0\n");

    // Execs are its own too: their ends come before its.
    let outputs = begin_among(&mut guest, "second", "exec sleep 772", SANDBOX);
    let process = serde_json::value::to_raw_value(&shell_process("exec sleep 773")).expect("JSON");
    let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
    let (container, exec) = ("second".to_owned(), ExecId(5));
    guest.send(&ToAgent::Exec(Box::new(ExecProcess { container, exec, process, stdio })));
    let started = |message: &FromAgent| matches!(message, FromAgent::ExecStarted { .. });
    guest.expect(started).expect("started");
    until_seen(&mut guest, "77[23]", 2);
    let container = "second".to_owned();
    guest.send(&ToAgent::Signal { container, exec: None, signal: libc::SIGTERM, all: false });
    match guest.receive() {
        FromAgent::ExecExited { status, .. } => assert_eq!(status.in_shell(), 137),
        other => panic!("{other:?}"),
    }
    assert_eq!(end(&mut guest, "second", outputs).0.in_shell(), 143);
    assert_eq!(seen_by_sandbox(&mut guest, "77[23]"), "0\n");

    // A third may live among the second's, which has a namespace of its own: its end is the third's.
    let second =
        begin(&mut guest, "second", &without_hostname(shell("exec sleep 774")), Vec::new());
    let third = begin_among(&mut guest, "third", "exec sleep 775", "second");
    let container = "second".to_owned();
    guest.send(&ToAgent::Signal { container, exec: None, signal: libc::SIGKILL, all: false });
    assert_eq!(end(&mut guest, "third", third).0.in_shell(), 137);
    assert_eq!(end(&mut guest, "second", second).0.in_shell(), 137);
    guest.kill();
}

#[test]
fn namespaces_that_are_gone_or_cannot_be_joined_are_refused() {
    let mut guest = Guest::start();
    let mut refused = |config: &Value, container: &str, words: &str| {
        let joined = Joined { container: container.to_owned(), ..joined() };
        let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
        guest.create_in("second", "rootfs", Some(joined), (config, Vec::new(), stdio));
        let created = |message: &FromAgent| matches!(message, FromAgent::Created { .. });
        let refusal = guest.expect(created).expect_err("refused");
        assert!(refusal.message.contains(words), "{}", refusal.message);
        refusal.phase
    };
    assert_eq!(refused(&shell("true"), "nobody", "does not run"), FailurePhase::Namespaces);
    let mut config = shell("true");
    let mapping = serde_json::json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    config["linux"]["uidMappings"] = mapping.clone();
    config["linux"]["gidMappings"] = mapping;
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(serde_json::json!({"type": "user"}));
    assert_eq!(refused(&config, "nobody", "users of its sandbox"), FailurePhase::Config);
}
