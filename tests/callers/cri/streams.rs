//! Streams of a program or a container, as `kubectl exec` and `attach` have them: a WebSocket (RFC 6455)
//! on which each message begins with the number of its channel (`v4.channel.k8s.io` of Kubernetes'
//! remotecommand).

use std::io::{Read, Write};
use std::net::TcpStream;

use super::messages::{AttachRequest, ExecRequest, StreamResponse};
use super::node::{Node, ask};
use crate::stage::{PATIENCE, on_stage};

/// Channels, and the message type of data that is not text.
const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STATUS: u8 = 3;
const RESIZE: u8 = 4;
const BINARY: u8 = 2;

/// A connection to the streams that a call has given the address of.
struct Streams(TcpStream);

impl Streams {
    fn open(method: &str, request: &impl prost::Message) -> Self {
        let url = ask::<StreamResponse>(method, request).url;
        let (host, path) =
            url.strip_prefix("http://").and_then(|rest| rest.split_once('/')).expect("an address");
        let mut stream = TcpStream::connect(host).expect("the server of streams");
        stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
        write!(
            stream,
            "GET /{path} HTTP/1.1\r\nHost: {host}\r\nOrigin: http://{host}\r\nConnection: Upgrade\r\n\
             Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
             Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
             Sec-WebSocket-Protocol: v4.channel.k8s.io\r\n\r\n"
        )
        .expect("written");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("an answer");
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
        Self(stream)
    }

    /// Sends a short message. Clients mask theirs, here with zeroes.
    fn send(&mut self, channel: u8, data: &str) {
        let length = u8::try_from(data.len() + 1).expect("short");
        assert!(length < 126, "short");
        let head = [0x80 | BINARY, 0x80 | length, 0, 0, 0, 0, channel];
        self.0.write_all(&[&head[..], data.as_bytes()].concat()).expect("written");
    }

    /// The next message that has content; none at the end.
    fn receive(&mut self) -> Option<(u8, String)> {
        loop {
            let mut head = [0; 2];
            self.0.read_exact(&mut head).ok()?;
            let length = match head[1] {
                126 => u16::from_be_bytes(self.read()).into(),
                127 => usize::try_from(u64::from_be_bytes(self.read())).expect("a length"),
                length => usize::from(length),
            };
            let mut message = vec![0; length];
            self.0.read_exact(&mut message).expect("a message");
            if head[0] & 0xf != BINARY {
                return None;
            }
            if let [channel, data @ ..] = &message[..]
                && !data.is_empty()
            {
                return Some((*channel, String::from_utf8_lossy(data).into_owned()));
            }
        }
    }

    fn read<const LENGTH: usize>(&mut self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        self.0.read_exact(&mut bytes).expect("a length");
        bytes
    }

    /// Reads standard output until it has this; gives what came up to then.
    fn until(&mut self, words: &str) -> String {
        let mut output = String::new();
        while !output.contains(words) {
            let (channel, data) = self.receive().unwrap_or_else(|| panic!("it ended: {output:?}"));
            assert_eq!(channel, STDOUT, "{data}");
            output += &data;
        }
        output
    }

    /// Reads to the end; gives how the program ended.
    fn status(&mut self) -> String {
        loop {
            match self.receive().expect("a status") {
                (STATUS, status) => return status,
                (STDOUT, _) => {}
                (channel, data) => panic!("channel {channel}: {data}"),
            }
        }
    }
}

#[test]
fn programs_and_containers_are_typed_into() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let mut config = pod.container("main", "while read line; do echo got $line; done; exit 3");
        config.stdin = true;
        let id = pod.start(config).unwrap_or_else(|refusal| panic!("{refusal}"));

        let script = "echo ready; until stty size | grep '31 97'; do sleep 0.1; done
            read line; echo \"<$line>\"; exit 5";
        let mut terminal = Streams::open(
            "Exec",
            &ExecRequest {
                container_id: id.clone(),
                cmd: ["sh", "-c", script].map(str::to_owned).into(),
                tty: true,
                stdin: true,
                stdout: true,
            },
        );
        terminal.until("ready");
        terminal.send(RESIZE, "{\"Width\": 97, \"Height\": 31}");
        terminal.until("31 97\r\n");
        terminal.send(STDIN, "typed\n");
        let screen = terminal.until("<typed>");
        assert!(screen.starts_with("typed\r\n"), "the terminal echoes: {screen:?}");
        let status = terminal.status();
        assert!(status.contains("ExitCode") && status.contains("\"5\""), "{status}");

        let attach = AttachRequest { container_id: id, stdin: true, stdout: true };
        let mut attached = Streams::open("Attach", &attach);
        attached.send(STDIN, "one\n");
        assert_eq!(attached.until("\n"), "got one\n");
        attached.send(STDIN, "two\n");
        assert_eq!(attached.until("\n"), "got two\n");
        drop(attached);
        pod.remove();
    });
}
