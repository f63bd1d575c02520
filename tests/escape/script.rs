//! A program in the agent's place that plays a script, beside `agent.c`, which is that program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kiln_protocol::frame::encode;
use kiln_protocol::{CONTROL_PORT, ExitStatus, FromAgent, STREAM_PORT, StreamHeader, VERSION};

use crate::stage::{Stage, lib_dir};

/// What the agent does.
#[derive(Default)]
pub struct Script(Vec<u8>);

impl Script {
    /// One that has said hello, and been welcomed and told to create a container.
    pub fn greeted() -> Self {
        Self::default().greet()
    }

    /// One whose container is set up, with streams, and told to start.
    pub fn created() -> Self {
        Self::default().take_streams().greet().say(&FromAgent::Created { container: id() }).read()
    }

    fn greet(self) -> Self {
        self.say(&hello()).read().read()
    }

    /// Sends a message.
    pub fn say(self, message: &FromAgent) -> Self {
        self.send(&encode(message, usize::MAX).expect("encodes"))
    }

    /// Sends bytes.
    pub fn send(self, bytes: &[u8]) -> Self {
        self.step(b's', bytes)
    }

    /// Sends the same bytes for ever.
    pub fn flood(self, bytes: &[u8]) -> Self {
        self.step(b'f', bytes)
    }

    fn step(mut self, kind: u8, bytes: &[u8]) -> Self {
        self.0.push(kind);
        self.0.extend((bytes.len() as u32).to_le_bytes());
        self.0.extend(bytes);
        self
    }

    /// Reads a message.
    pub fn read(mut self) -> Self {
        self.0.push(b'r');
        self
    }

    /// Closes the connection.
    pub fn close(mut self) -> Self {
        self.0.push(b'c');
        self
    }

    /// Makes as many further connections as it can.
    pub fn connect_more(mut self) -> Self {
        self.0.push(b'n');
        self
    }

    /// Takes streams from here on, and ends each at once.
    pub fn take_streams(mut self) -> Self {
        self.0.push(b't');
        self
    }

    /// Does nothing for some seconds.
    pub fn pause(mut self, seconds: u8) -> Self {
        self.0.extend([b'p', seconds]);
        self
    }

    /// Runs in circles from here on.
    pub fn spin(mut self) -> Self {
        self.0.push(b'l');
        self
    }

    /// Has so many processes run in circles from here on.
    pub fn spin_on(mut self, cpus: u8) -> Self {
        self.0.extend([b'm', cpus]);
        self
    }

    /// Ends, which the guest's kernel doesn't survive.
    pub fn exit(mut self) -> Self {
        self.0.push(b'x');
        self
    }

    /// A folder with the kernel and, as the agent, a program that plays the script.
    pub fn compile(&self, stage: &Stage) -> PathBuf {
        let lib = stage.path().join("lib");
        fs::create_dir(&lib).expect("made");
        std::os::unix::fs::symlink(lib_dir().join("vmlinux"), lib.join("vmlinux")).expect("linked");
        let bytes: Vec<String> = self.0.iter().map(u8::to_string).collect();
        let header = stage.path().join("script.h");
        let script = format!(
            "enum {{ PORT = {CONTROL_PORT}, STREAM_PORT = {STREAM_PORT}, STREAM_HEADER = {} }};\n\
             static const unsigned char SCRIPT[] = {{{}}};\n",
            StreamHeader::SIZE,
            bytes.join(",")
        );
        fs::write(&header, script).expect("written");
        let compiled = Command::new("gcc")
            .args(["-static", "-O2", "-Wall", "-Werror", "-s", "-include"])
            .arg(header)
            .arg("-o")
            .arg(lib.join("kiln-agent"))
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape/agent.c"))
            .status();
        assert!(compiled.expect("gcc must be installed").success(), "agent.c does not compile");
        lib
    }
}

/// The container's id.
pub fn id() -> String {
    "test".to_owned()
}

/// What an agent says first.
pub fn hello() -> FromAgent {
    let (version, kernel) = ("0.1.0".to_owned(), "6.12".to_owned());
    FromAgent::Hello { protocol: VERSION, version, kernel }
}

/// That the container has ended well.
pub fn exited() -> FromAgent {
    FromAgent::Exited { container: id(), status: ExitStatus::Code(0), oom_killed: false }
}
