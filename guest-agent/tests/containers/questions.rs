//! Questions that need no cgroup controller: pausing and listing processes.

use std::time::Duration;

use kiln_protocol::{
    Answer, ExecId, ExitStatus, FromAgent, GuestProcess, Question, Stdio, ToAgent,
};
use serde_json::json;

use crate::guest::{Guest, is_started, program, shell, shell_process};
use crate::process::with_user_namespace;

const NO_STDIO: Stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };

/// Counts in a file as fast as it can.
const COUNTING: &str = "i=0; while :; do i=$((i+1)); echo $i > /count.new; \
                        cat /count.new > /count; done";

fn counting_guest() -> Guest {
    let mut guest = Guest::start();
    guest.run_on(&shell(COUNTING));
    await_change(&guest, "");
    guest
}

fn count(guest: &Guest) -> String {
    std::fs::read_to_string(guest.rootfs().join("count")).unwrap_or_default()
}

fn await_change(guest: &Guest, before: &str) {
    while count(guest) == before {
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether all processes stand still: none of them gets processor time.
fn stands_still(guest: &mut Guest) -> bool {
    let times = |guest: &mut Guest| -> Vec<(u32, u64)> {
        processes(guest).into_iter().map(|process| (process.pid, process.cpu_time_ms)).collect()
    };
    let (before, count_before) = (times(guest), count(guest));
    std::thread::sleep(Duration::from_millis(200));
    times(guest) == before && count(guest) == count_before
}

fn processes(guest: &mut Guest) -> Vec<GuestProcess> {
    match guest.ask(Question::Processes) {
        Answer::Processes(processes) => processes,
        other => panic!("{other:?}"),
    }
}

#[test]
fn paused_container_stands_still_until_it_is_resumed() {
    let mut guest = counting_guest();
    for _ in 0..3 {
        // Once more changes nothing.
        for _ in 0..2 {
            assert_eq!(guest.ask(Question::Pause), Answer::Done);
            assert!(stands_still(&mut guest));
        }
        let before = count(&guest);
        assert_eq!(guest.ask(Question::Resume), Answer::Done);
        await_change(&guest, &before);
        assert_eq!(guest.ask(Question::Resume), Answer::Done);
    }
    guest.kill();
}

#[test]
fn paused_container_can_be_killed() {
    for all in [true, false] {
        let mut guest = counting_guest();
        assert_eq!(guest.ask(Question::Pause), Answer::Done);
        guest.signal(None, libc::SIGKILL, all);
        assert_eq!(guest.wait(), ExitStatus::Signal(libc::SIGKILL as u8));
    }
}

#[test]
fn exec_in_a_paused_container_waits_for_its_resumption() {
    let mut guest = counting_guest();
    assert_eq!(guest.ask(Question::Pause), Answer::Done);
    guest.send_exec(ExecId(1), &shell_process("exit 9"), NO_STDIO);
    // What is answered next is the question: the exec has not begun.
    assert!(stands_still(&mut guest));
    assert_eq!(guest.ask(Question::Resume), Answer::Done);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    let ended = FromAgent::ExecExited {
        container: "c".to_owned(),
        exec: ExecId(1),
        status: ExitStatus::Code(9),
    };
    assert_eq!(guest.receive(), ended);
    guest.kill();
}

#[test]
fn container_that_waits_for_its_start_can_be_paused() {
    let mut guest = Guest::start();
    guest.create(&shell("exit 5"), Vec::new(), NO_STDIO);
    guest.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
    assert_eq!(guest.ask(Question::Pause), Answer::Done);
    guest.start_container();
    assert_eq!(guest.ask(Question::Resume), Answer::Done);
    guest.expect(|message| matches!(message, FromAgent::Started { .. })).expect("started");
    assert_eq!(guest.wait(), ExitStatus::Code(5));
}

#[test]
fn processes_are_listed_as_the_guest_sees_them() {
    let mut guest = Guest::start();
    let mut config = with_user_namespace(shell("exec sleep 1000"));
    config["process"]["user"] = json!({"uid": 7, "gid": 7});
    guest.run_on(&config);
    let mut process = program(&["/bin/sleep", "1001"])["process"].take();
    process["user"] = json!({"uid": 1000, "gid": 1000});
    guest.send_exec(ExecId(1), &process, NO_STDIO);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    let mut all = processes(&mut guest);
    all.sort_by_key(|process| process.uid);
    let [first, exec] = all.as_slice() else { panic!("{all:?}") };
    assert_eq!((first.container_pid, first.uid), (1, 200_007));
    assert_eq!(first.command, ["sleep", "1000"]);
    assert_eq!((exec.uid, exec.parent, exec.name.as_str()), (201_000, first.parent, "sleep"));
    assert_eq!(exec.command, ["/bin/sleep", "1001"]);
    assert!(exec.container_pid > 1 && exec.pid != exec.container_pid);
    assert!(exec.start_time >= first.start_time);
    guest.kill();
}

#[test]
fn names_and_arguments_that_processes_choose_stay_within_the_protocols_bounds() {
    let mut guest = Guest::start();
    let long = "\u{e9}".repeat(300);
    guest.run_on(&shell("exec sleep 1000"));
    let strange =
        format!("printf 'a) R 1 (\\n' > /proc/self/comm; exec 3<&0; read x < /fifo; : {long}");
    std::process::Command::new("mkfifo").arg(guest.rootfs().join("fifo")).status().expect("fifo");
    guest.send_exec(ExecId(1), &shell_process(&strange), NO_STDIO);
    guest.expect(|message| is_started(message, ExecId(1))).expect("started");
    let found = loop {
        let all = processes(&mut guest);
        if let Some(found) = all.into_iter().find(|process| process.name.starts_with("a) R")) {
            break found;
        }
    };
    assert_eq!(found.command[..2], ["/bin/sh", "-c"]);
    assert!(found.command.iter().map(String::len).sum::<usize>() <= kiln_protocol::MAX_COMMAND);
    guest.kill();
}

#[test]
fn question_about_what_is_not_there_is_refused_and_answered_once() {
    let mut guest = Guest::start();
    let questions = [Question::Pause, Question::Resume, Question::Processes, Question::Statistics];
    for (request, question) in (1..).zip(questions) {
        guest.send(&ToAgent::Ask { request, container: "c".to_owned(), question });
        match guest.receive() {
            FromAgent::Answer { container, request: of, answer: Answer::Refused(why) } => {
                assert_eq!((container.as_str(), of), ("c", request));
                assert!(why.contains("does not run"), "{why}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn pause_that_is_overtaken_by_the_end_is_answered() {
    let mut guest = counting_guest();
    for request in 1..=3 {
        let question = Question::Pause;
        guest.send(&ToAgent::Ask { request, container: "c".to_owned(), question });
    }
    guest.signal(None, libc::SIGKILL, true);
    let mut answers = 0;
    loop {
        match guest.receive() {
            FromAgent::Answer { answer: Answer::Done | Answer::Refused(_), .. } => answers += 1,
            FromAgent::Exited { .. } => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(answers, 3);
}
