//! Bringing streams together: the host's connections name the stream they are, processes say which
//! streams they have. Either may come first.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kiln_protocol::{StreamHeader, StreamToken};
use rustix::io::Errno;

use super::process::ProcessName;
use crate::stream::accept_from_host;

/// Connections that may be waiting, for their header or for their process. More are closed: the host
/// connects the streams of a process when it asks for it, and this is three each of a few hundred.
const MAX_WAITING: usize = 1024;

/// A process's end of a stream.
#[derive(Debug)]
pub enum Endpoint {
    /// The writing end of its standard input.
    Input(OwnedFd),
    /// The reading end of an output.
    Output(OwnedFd),
    /// Its terminal's master.
    Terminal(OwnedFd),
}

/// A stream of which both ends are there.
#[derive(Debug)]
pub struct Pair {
    /// The process.
    pub process: ProcessName,
    /// Its end.
    pub endpoint: Endpoint,
    /// The host's.
    pub connection: OwnedFd,
}

/// Everything that waits for its other half.
#[derive(Debug)]
pub struct Streams {
    listener: OwnedFd,
    next: u64,
    headers: HashMap<u64, Header>,
    connections: HashMap<StreamToken, OwnedFd>,
    endpoints: HashMap<StreamToken, (ProcessName, Endpoint)>,
}

#[derive(Debug)]
struct Header {
    connection: OwnedFd,
    bytes: Vec<u8>,
}

impl Streams {
    /// Takes a listening, non-blocking socket over.
    pub fn new(listener: OwnedFd) -> Self {
        Self {
            listener,
            next: 0,
            headers: HashMap::new(),
            connections: HashMap::new(),
            endpoints: HashMap::new(),
        }
    }

    /// The listening socket, to be polled.
    pub fn listener(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }

    /// Accepts a connection. Gives its number, under which its header is awaited.
    ///
    /// # Errors
    /// As accept(2), but not for a connection that is gone again.
    pub fn accept(&mut self) -> io::Result<Option<u64>> {
        let connection = match accept_from_host(self.listener()) {
            Ok(Some(connection)) => connection,
            Ok(None) => return Ok(None),
            Err(error) if is_passing(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        if self.headers.len() + self.connections.len() >= MAX_WAITING {
            return Ok(None);
        }
        let id = self.next;
        self.next += 1;
        let bytes = Vec::with_capacity(StreamHeader::SIZE);
        self.headers.insert(id, Header { connection, bytes });
        Ok(Some(id))
    }

    /// The connection whose header is awaited under a number.
    pub fn awaiting_header(&self, id: u64) -> Option<BorrowedFd<'_>> {
        self.headers.get(&id).map(|header| header.connection.as_fd())
    }

    /// Reads on in a header. Gives the connection's token once it is whole.
    pub fn read_header(&mut self, id: u64) -> Option<(StreamToken, OwnedFd)> {
        let header = self.headers.get_mut(&id)?;
        let mut bytes = [0; StreamHeader::SIZE];
        let missing = StreamHeader::SIZE - header.bytes.len();
        match rustix::io::read(&header.connection, &mut bytes[..missing]) {
            Ok(length) if length > 0 => header.bytes.extend_from_slice(&bytes[..length]),
            Err(Errno::AGAIN | Errno::INTR) => return None,
            _ => {
                self.headers.remove(&id);
                return None;
            }
        }
        let whole: [u8; StreamHeader::SIZE] = header.bytes.as_slice().try_into().ok()?;
        let connection = self.headers.remove(&id)?.connection;
        Some((StreamHeader::from_bytes(whole).token, connection))
    }

    /// A connection that has said which stream it is.
    pub fn connected(&mut self, token: StreamToken, connection: OwnedFd) -> Option<Pair> {
        match self.endpoints.remove(&token) {
            Some((process, endpoint)) => Some(Pair { process, endpoint, connection }),
            None => {
                self.connections.insert(token, connection);
                None
            }
        }
    }

    /// A process's end of a stream.
    pub fn offered(
        &mut self,
        token: StreamToken,
        process: &ProcessName,
        endpoint: Endpoint,
    ) -> Option<Pair> {
        let process = process.clone();
        match self.connections.remove(&token) {
            Some(connection) => Some(Pair { process, endpoint, connection }),
            None => {
                self.endpoints.insert(token, (process, endpoint));
                None
            }
        }
    }

    /// Drops what waits for the streams of a process that never came to be.
    pub fn cancel(&mut self, tokens: &[StreamToken]) {
        for token in tokens {
            self.endpoints.remove(token);
            self.connections.remove(token);
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    let passing = [libc::EAGAIN, libc::EINTR, libc::ECONNABORTED, libc::ENOTCONN, libc::ECONNRESET];
    error.raw_os_error().is_some_and(|code| passing.contains(&code))
}
