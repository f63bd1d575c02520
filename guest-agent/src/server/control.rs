//! The control connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_protocol::frame::{self, Decoder};
use kiln_protocol::{FromAgent, MAX_FROM_AGENT, MAX_TO_AGENT, ToAgent};
use rustix::io::Errno;

use crate::stream::make_non_blocking;

/// Bytes read at once.
const CHUNK: usize = 64 << 10;

/// The connection, with what is half received and what is still to be sent. The latter is bounded by
/// what the host asks for: each request is answered at most twice.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
    decoder: Decoder,
    outgoing: VecDeque<u8>,
    chunk: Box<[u8; CHUNK]>,
}

impl Control {
    /// Takes the connection over.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        make_non_blocking(&socket)?;
        Ok(Self {
            socket,
            decoder: Decoder::new(MAX_TO_AGENT),
            outgoing: VecDeque::new(),
            chunk: Box::new([0; CHUNK]),
        })
    }

    /// The socket, to be polled.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The messages that have come by now.
    ///
    /// # Errors
    /// `UnexpectedEof` when the host has closed the connection, `InvalidData` for what is no message.
    pub fn receive(&mut self) -> io::Result<Vec<ToAgent>> {
        let length = match rustix::io::read(&self.socket, self.chunk.as_mut_slice()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(length) => length,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        self.decoder.push(&self.chunk[..length]);
        let mut messages = Vec::new();
        let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
        while let Some(message) = self.decoder.next().map_err(invalid)? {
            messages.push(message);
        }
        Ok(messages)
    }

    /// Queues a message and sends what the connection takes.
    ///
    /// # Errors
    /// As write(2), or a message beyond the protocol's limit.
    pub fn send(&mut self, message: &FromAgent) -> io::Result<()> {
        let frame = frame::encode(message, MAX_FROM_AGENT).map_err(io::Error::other)?;
        self.outgoing.extend(frame);
        self.flush()
    }

    /// Whether something is still to be sent: the connection should be polled for writing.
    pub fn is_congested(&self) -> bool {
        !self.outgoing.is_empty()
    }

    /// Sends what the connection takes.
    ///
    /// # Errors
    /// As write(2).
    pub fn flush(&mut self) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            let (bytes, _) = self.outgoing.as_slices();
            match rustix::io::write(&self.socket, bytes) {
                Ok(length) => drop(self.outgoing.drain(..length)),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}
