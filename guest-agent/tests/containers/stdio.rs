//! Pipes and terminals.

use std::io::{Read, Write};
use std::net::Shutdown;

use kiln_protocol::{ExitStatus, FromAgent, Stdio, ToAgent, WindowSize};
use serde_json::json;

use crate::guest::{Guest, shell};

#[test]
fn input_reaches_the_program_and_ends() {
    let mut guest = Guest::start();
    let (stdin, stdout) = (guest.token(), guest.token());
    let mut input = guest.connect(stdin);
    let stdio = Stdio::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    guest.create(&shell("cat; echo end"), Vec::new(), stdio);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    let mut output = guest.connect(stdout);
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    input.write_all(b"some input\n").expect("writes");
    input.shutdown(Shutdown::Write).expect("half-close");
    let mut text = String::new();
    output.read_to_string(&mut text).expect("reads");
    assert_eq!(text, "some input\nend\n");
    assert_eq!(guest.wait(), ExitStatus::Code(0));
}

#[test]
fn much_data_passes_both_ways_unchanged_and_in_order() {
    let mut guest = Guest::start();
    let (stdin, stdout) = (guest.token(), guest.token());
    let stdio = Stdio::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    guest.create(&shell("exec cat"), Vec::new(), stdio);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    let (mut input, mut output) = (guest.connect(stdin), guest.connect(stdout));
    let data: Vec<u8> = (0..32_000_000u32).map(|i| (i ^ (i >> 8) ^ (i >> 16)) as u8).collect();
    let sent = data.clone();
    let writer = std::thread::spawn(move || {
        input.write_all(&sent).expect("writes");
        input.shutdown(Shutdown::Write).expect("half-close");
    });
    let mut received = Vec::new();
    output.read_to_end(&mut received).expect("reads");
    writer.join().expect("writer");
    assert!(received == data, "{} bytes came back, or other ones", received.len());
    assert_eq!(guest.wait(), ExitStatus::Code(0));
}

#[test]
fn output_can_be_reopened_by_the_programs_user() {
    let mut guest = Guest::start();
    let mut config = shell("echo one > /dev/stdout; echo two >> /proc/self/fd/1; echo three >&2");
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "one\ntwo\n", "{}", outcome.stderr);
    assert_eq!(outcome.stderr, "three\n");
}

#[test]
fn absent_streams_are_the_null_device() {
    let mut guest = Guest::start();
    let outcome = guest.run(&shell("readlink /proc/self/fd/0; cat | wc -c"));
    assert_eq!(outcome.stdout, "/dev/null\n0\n");
}

#[test]
fn terminal_has_its_size_its_name_and_its_control() {
    let mut guest = Guest::start();
    let mut config = shell(
        "trap 'stty size; exit 3' WINCH; tty; stty size; stat -c '%t' /dev/console; \
         while :; do sleep 0.05; done",
    );
    config["process"]["terminal"] = json!(true);
    let size = WindowSize { rows: 40, columns: 132 };
    let mut terminal = guest.create_with_terminal(&config, size);
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    let mut text = String::new();
    let mut bytes = [0; 256];
    while !text.contains("88") {
        let length = terminal.read(&mut bytes).expect("reads");
        assert!(length > 0, "ended after {text:?}");
        text += &String::from_utf8_lossy(&bytes[..length]);
    }
    assert_eq!(text, "/dev/pts/0\r\n40 132\r\n88\r\n");
    let size = WindowSize { rows: 50, columns: 100 };
    guest.send(&ToAgent::Resize { container: "c".to_owned(), exec: None, size });
    let mut rest = String::new();
    terminal.read_to_string(&mut rest).expect("reads");
    assert_eq!(rest, "50 100\r\n");
    assert_eq!(guest.wait(), ExitStatus::Code(3));
}

#[test]
fn keys_reach_the_program_and_the_end_of_the_hosts_input_is_no_key() {
    let mut guest = Guest::start();
    let mut config =
        shell("read line; echo got $line; read more || echo ended; sleep 1; echo still");
    config["process"]["terminal"] = json!(true);
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let size = WindowSize { rows: 24, columns: 80 };
    let mut terminal = guest.create_with_terminal(&config, size);
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    terminal.write_all(b"word\n\x04").expect("types");
    terminal.shutdown(Shutdown::Write).expect("half-close");
    let mut text = String::new();
    terminal.read_to_string(&mut text).expect("reads");
    assert!(text.contains("got word\r\n"), "{text:?}");
    assert!(text.ends_with("ended\r\nstill\r\n"), "{text:?}");
    assert_eq!(guest.wait(), ExitStatus::Code(0));
}

#[test]
fn end_of_the_connection_ends_everything() {
    let mut guest = Guest::start();
    let stdout = guest.token();
    let stdio = Stdio::Pipes { stdin: None, stdout: Some(stdout), stderr: None };
    guest.create(&shell("echo here; sleep 1000"), Vec::new(), stdio);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    let mut output = guest.connect(stdout);
    let mut text = [0; 5];
    output.read_exact(&mut text).expect("reads");
    assert_eq!(&text, b"here\n");
    drop(guest);
    assert_eq!(output.read(&mut text).expect("the stream ends"), 0);
}

#[test]
fn input_may_be_complete_before_there_is_a_container() {
    let mut guest = Guest::start();
    let (stdin, stdout) = (guest.token(), guest.token());
    let mut input = guest.connect(stdin);
    input.write_all(b"early\n").expect("writes");
    drop(input);
    let mut output = guest.connect(stdout);
    let stdio = Stdio::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: None };
    guest.create(&shell("sleep 0.2; exec cat"), Vec::new(), stdio);
    assert!(matches!(guest.receive(), FromAgent::Created { .. }));
    guest.start_container();
    assert!(matches!(guest.receive(), FromAgent::Started { .. }));
    let mut text = String::new();
    output.read_to_string(&mut text).expect("reads");
    assert_eq!(text, "early\n");
    assert_eq!(guest.wait(), ExitStatus::Code(0));
}
