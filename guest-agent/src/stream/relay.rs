//! One direction of a stream.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::pipe::{SpliceFlags, splice};

/// Bytes moved at once: a packet's worth of copying, a pipe's worth of splicing.
const BUFFER: usize = 64 << 10;
const PIPE: usize = 1 << 20;

/// Moves before other descriptors get their turn.
const MOVES: usize = 16;

/// An end of a relay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Where bytes come from: wait until it can be read.
    Source,
    /// Where they go: wait until it can be written.
    Sink,
}

/// What a relay needs next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// A side to become ready.
    Wait(Side),
    /// The connection to be closed by the host: wait until the sink can be read.
    Linger,
    /// Another turn.
    Again,
    /// Nothing: drop it.
    Done,
}

/// One direction of a stream. Both descriptors are non-blocking.
#[derive(Debug)]
pub struct Relay {
    source: OwnedFd,
    sink: OwnedFd,
    state: State,
    to_host: bool,
}

#[derive(Debug)]
enum State {
    Splicing,
    Copying { buffer: Box<[u8; BUFFER]>, start: usize, end: usize },
    Lingering,
}

impl State {
    fn copying() -> Self {
        Self::Copying { buffer: Box::new([0; BUFFER]), start: 0, end: 0 }
    }
}

impl Relay {
    /// From a pipe to a connection.
    pub fn from_pipe(pipe: OwnedFd, connection: OwnedFd) -> Self {
        Self { source: pipe, sink: connection, state: State::Splicing, to_host: true }
    }

    /// From a terminal's master to a connection.
    pub fn from_terminal(master: OwnedFd, connection: OwnedFd) -> Self {
        Self { source: master, sink: connection, state: State::copying(), to_host: true }
    }

    /// From a connection to a pipe or a terminal's master.
    pub fn to_process(connection: OwnedFd, sink: OwnedFd) -> Self {
        Self { source: connection, sink, state: State::copying(), to_host: false }
    }

    /// The descriptor of a side.
    pub fn descriptor(&self, side: Side) -> BorrowedFd<'_> {
        match side {
            Side::Source => self.source.as_fd(),
            Side::Sink => self.sink.as_fd(),
        }
    }

    /// Moves what can be moved now.
    pub fn advance(&mut self) -> Progress {
        for _ in 0..MOVES {
            let moved = match &self.state {
                State::Splicing => self.splice(),
                State::Copying { .. } => self.copy(),
                State::Lingering => return self.linger(),
            };
            match moved {
                Move::Moved => {}
                Move::Wait(side) => return Progress::Wait(side),
                Move::EndOfSource if self.to_host => {
                    // If the host is gone already there is nobody to tell.
                    let _ = shutdown(&self.sink, Shutdown::Write);
                    self.state = State::Lingering;
                    return Progress::Linger;
                }
                Move::EndOfSource | Move::EndOfSink => return Progress::Done,
            }
        }
        Progress::Again
    }

    fn splice(&mut self) -> Move {
        let flags = SpliceFlags::NONBLOCK | SpliceFlags::MOVE;
        match splice(&self.source, None, &self.sink, None, PIPE, flags) {
            Ok(0) => Move::EndOfSource,
            Ok(_) | Err(Errno::INTR) => Move::Moved,
            Err(Errno::AGAIN) => match rustix::io::ioctl_fionread(&self.source) {
                Ok(0) => Move::Wait(Side::Source),
                _ => Move::Wait(Side::Sink),
            },
            Err(Errno::INVAL) => {
                self.state = State::copying();
                Move::Moved
            }
            Err(_) => Move::EndOfSink,
        }
    }

    fn copy(&mut self) -> Move {
        let State::Copying { buffer, start, end } = &mut self.state else {
            return Move::Moved;
        };
        if start == end {
            match rustix::io::read(&self.source, buffer.as_mut_slice()) {
                // A terminal whose users have all gone reads as EIO; a connection may be reset.
                Ok(0) | Err(Errno::IO | Errno::CONNRESET | Errno::NOTCONN) => {
                    return Move::EndOfSource;
                }
                Ok(length) => (*start, *end) = (0, length),
                Err(Errno::AGAIN) => return Move::Wait(Side::Source),
                Err(Errno::INTR) => return Move::Moved,
                Err(_) => return Move::EndOfSource,
            }
        }
        match rustix::io::write(&self.sink, &buffer[*start..*end]) {
            Ok(length) => {
                *start += length;
                Move::Moved
            }
            Err(Errno::AGAIN) => Move::Wait(Side::Sink),
            Err(Errno::INTR) => Move::Moved,
            Err(_) => Move::EndOfSink,
        }
    }

    /// Reads away whatever the host still sends until it closes.
    fn linger(&self) -> Progress {
        let mut discarded = [0; 4096];
        match rustix::io::read(&self.sink, &mut discarded) {
            Ok(0) => Progress::Done,
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Progress::Linger,
            Err(_) => Progress::Done,
        }
    }
}

enum Move {
    Moved,
    Wait(Side),
    EndOfSource,
    EndOfSink,
}

/// Makes a descriptor non-blocking.
///
/// # Errors
/// As fcntl(2).
pub fn make_non_blocking(descriptor: impl AsFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(&descriptor)?;
    Ok(rustix::fs::fcntl_setfl(&descriptor, flags | rustix::fs::OFlags::NONBLOCK)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::Shutdown as NetShutdown;
    use std::os::unix::net::UnixStream;

    /// Advances until the relay has to wait, or is done.
    fn drive(relay: &mut Relay) -> Progress {
        loop {
            match relay.advance() {
                Progress::Again => {}
                other => return other,
            }
        }
    }

    fn pipe_to_socket() -> (std::fs::File, Relay, UnixStream) {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let (agent, host) = UnixStream::pair().expect("socket pair");
        make_non_blocking(&reader).expect("non-blocking");
        make_non_blocking(&agent).expect("non-blocking");
        (writer.into(), Relay::from_pipe(reader, agent.into()), host)
    }

    #[test]
    fn output_stops_while_the_host_does_not_read_and_arrives_whole() {
        let (mut writer, mut relay, mut host) = pipe_to_socket();
        make_non_blocking(&writer).expect("non-blocking");
        let data: Vec<u8> = (0..4_000_000u32).map(|i| (i * 7 + (i >> 9)) as u8).collect();
        let (mut written, mut received) = (0, Vec::new());
        let mut chunk = vec![0; 70_000];
        while received.len() < data.len() {
            while written < data.len() {
                match writer.write(&data[written..]) {
                    Ok(length) => written += length,
                    Err(error) => {
                        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                        if drive(&mut relay) == Progress::Wait(Side::Sink) {
                            break;
                        }
                    }
                }
            }
            drive(&mut relay);
            let length = host.read(&mut chunk).expect("reads");
            received.extend_from_slice(&chunk[..length]);
        }
        assert!(received == data, "the bytes differ");
    }

    #[test]
    fn end_of_output_is_a_half_close_and_the_relay_stays_until_the_host_closes() {
        let (mut writer, mut relay, mut host) = pipe_to_socket();
        writer.write_all(b"last words").expect("writes");
        drop(writer);
        assert_eq!(drive(&mut relay), Progress::Linger);
        let mut text = String::new();
        host.read_to_string(&mut text).expect("reads to the end");
        assert_eq!(text, "last words");
        assert_eq!(drive(&mut relay), Progress::Linger);
        drop(host);
        assert_eq!(drive(&mut relay), Progress::Done);
    }

    #[test]
    fn host_that_is_gone_breaks_the_pipe() {
        let (mut writer, mut relay, host) = pipe_to_socket();
        drop(host);
        writer.write_all(b"x").expect("writes");
        assert_eq!(drive(&mut relay), Progress::Done);
        drop(relay);
        assert_eq!(writer.write(b"x").expect_err("broken").kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn end_of_input_closes_the_pipe_after_the_last_byte() {
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        let (agent, mut host) = UnixStream::pair().expect("socket pair");
        make_non_blocking(&writer).expect("non-blocking");
        make_non_blocking(&agent).expect("non-blocking");
        let mut relay = Relay::to_process(agent.into(), writer);
        host.write_all(b"typed").expect("writes");
        assert_eq!(drive(&mut relay), Progress::Wait(Side::Source));
        host.shutdown(NetShutdown::Write).expect("half-close");
        assert_eq!(drive(&mut relay), Progress::Done);
        drop(relay);
        let mut text = String::new();
        std::fs::File::from(reader).read_to_string(&mut text).expect("reads");
        assert_eq!(text, "typed");
    }

    #[test]
    fn terminal_without_users_is_the_end_of_output() {
        let terminal = nix::pty::openpty(None, None).expect("pty");
        let (agent, mut host) = UnixStream::pair().expect("socket pair");
        make_non_blocking(&terminal.master).expect("non-blocking");
        make_non_blocking(&agent).expect("non-blocking");
        let mut relay = Relay::from_terminal(terminal.master, agent.into());
        let mut slave = std::fs::File::from(terminal.slave);
        slave.write_all(b"bye\n").expect("writes");
        drop(slave);
        assert_eq!(drive(&mut relay), Progress::Linger);
        let mut text = String::new();
        host.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "bye\r\n");
    }
}
