//! One connection: the host's socket and the credit of both directions.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::net::{RecvFlags, SendFlags, Shutdown, recv, send, shutdown};

use super::BUFFER_SIZE;
use super::packet::{Header, SHUTDOWN_SEND};
use crate::virtio::buffers::Bytes;

/// Bytes forwarded that the guest doesn't know of yet, from which on it is told.
const UPDATE_AFTER: u32 = BUFFER_SIZE / 4;

/// The two ports that name a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
}

/// How far a connection is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The guest was asked and has not answered.
    Requested,
    /// Both ends have it.
    Established,
    /// The guest has ended it: what it sent before is still passed on.
    Ended,
}

/// The guest sent more than its credit.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct CreditExceeded;

/// A connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) key: Key,
    pub(super) state: State,
    stream: UnixStream,

    /// The host's socket may have something to read: data, or its end.
    pub(super) readable: bool,
    /// The connection waits in the list of those that have something for the guest.
    pub(super) listed: bool,
    /// The host's socket is closed in both directions.
    pub(super) hung_up: bool,
    /// The flags of `SHUTDOWN` that the guest has been told.
    pub(super) shutdown_told: u32,
    sent: Wrapping<u32>,
    guest_buf_alloc: u32,
    guest_fwd_cnt: Wrapping<u32>,
    /// The guest was asked for credit since it last had some.
    pub(super) credit_requested: bool,

    /// What the host's socket did not take yet; at most [`BUFFER_SIZE`] bytes.
    backlog: VecDeque<u8>,
    /// The guest will send no more.
    pub(super) guest_sent_all: bool,
    /// The guest wants no more.
    pub(super) guest_takes_none: bool,
    /// Nobody reads on the host: what the guest sends is dropped.
    pub(super) unread: bool,
    forwarded: Wrapping<u32>,
    forwarded_told: Wrapping<u32>,
    /// A credit update is on its way.
    pub(super) update_listed: bool,
}

impl Connection {
    pub(super) fn new(key: Key, state: State, stream: UnixStream) -> Self {
        Self {
            key,
            state,
            stream,
            readable: false,
            listed: false,
            hung_up: false,
            shutdown_told: 0,
            sent: Wrapping(0),
            guest_buf_alloc: 0,
            guest_fwd_cnt: Wrapping(0),
            credit_requested: false,
            backlog: VecDeque::new(),
            guest_sent_all: false,
            guest_takes_none: false,
            unread: false,
            forwarded: Wrapping(0),
            forwarded_told: Wrapping(0),
            update_listed: false,
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Takes the guest's side of credit from a packet's header.
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = Wrapping(header.fwd_cnt);
        if self.credit() > 0 {
            self.credit_requested = false;
        }
    }

    /// How many bytes the guest takes.
    pub(super) fn credit(&self) -> u32 {
        let in_flight = self.sent - self.guest_fwd_cnt;
        self.guest_buf_alloc.saturating_sub(in_flight.0)
    }

    /// Fills in the host's side of credit, of which the guest then knows.
    pub(super) fn tell_credit(&mut self, header: &mut Header) {
        header.buf_alloc = BUFFER_SIZE;
        header.fwd_cnt = self.forwarded.0;
        self.forwarded_told = self.forwarded;
    }

    /// Whether it is time to tell the guest of the credit that it has won back.
    pub(super) fn owes_update(&self) -> bool {
        (self.forwarded - self.forwarded_told).0 >= UPDATE_AFTER
    }

    /// Whether there is something for the guest, as far as is known without looking.
    pub(super) fn has_for_guest(&self) -> bool {
        self.readable
            && self.state == State::Established
            && !self.guest_takes_none
            && self.shutdown_told & SHUTDOWN_SEND == 0
    }

    /// Reads from the host straight into guest memory, at most the guest's credit. 0 is the end.
    pub(super) fn read_into(&mut self, target: &mut Bytes<'_>) -> io::Result<u32> {
        let count = target.receive_from(self.stream.as_fd(), self.credit() as usize)?;
        let count = u32::try_from(count).map_err(|_| io::ErrorKind::InvalidData)?;
        self.sent += count;
        Ok(count)
    }

    /// Passes the guest's data on, or keeps what the host doesn't take at once.
    pub(super) fn forward(&mut self, mut data: Bytes<'_>) -> Result<(), CreditExceeded> {
        let total = data.len();
        if total > BUFFER_SIZE as usize - self.backlog.len() {
            return Err(CreditExceeded);
        }
        if self.backlog.is_empty() && !self.unread {
            while !data.is_empty() {
                match data.send_to(self.stream.as_fd()) {
                    Ok(_) => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => self.unread = true,
                }
                if self.unread {
                    break;
                }
            }
        }
        if self.unread {
            self.drop_backlog();
            self.count_forwarded(total);
            return Ok(());
        }
        self.count_forwarded(total - data.len());
        if !data.is_empty() {
            let start = self.backlog.len();
            self.backlog.resize(start + data.len(), 0);
            let (front, back) = self.backlog.as_mut_slices();
            if start < front.len() {
                data.read(&mut front[start..]);
                data.read(back);
            } else {
                data.read(&mut back[start - front.len()..]);
            }
        }
        Ok(())
    }

    /// Whether data waits for the host to read.
    pub(super) fn is_behind(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Passes on what was kept, as much as the host takes now.
    pub(super) fn flush(&mut self) {
        while !self.backlog.is_empty() {
            let (front, _) = self.backlog.as_slices();
            match send(&self.stream, front, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(count) => {
                    self.backlog.drain(..count);
                    self.count_forwarded(count);
                }
                Err(rustix::io::Errno::AGAIN) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => {
                    self.unread = true;
                    self.drop_backlog();
                }
            }
        }
        self.backlog = VecDeque::new();
        if self.guest_sent_all {
            self.end_writing();
        }
    }

    /// The guest will send no more: the host reads end of file once it has read everything.
    pub(super) fn finish_writing(&mut self) {
        self.guest_sent_all = true;
        if self.backlog.is_empty() {
            self.end_writing();
        }
    }

    /// The guest wants no more: whoever writes on the host is told (`EPIPE`).
    pub(super) fn finish_reading(&mut self) {
        self.guest_takes_none = true;
        let _ = shutdown(&self.stream, Shutdown::Read);
    }

    /// Nobody reads on the host any more.
    pub(super) fn drop_backlog(&mut self) {
        let count = self.backlog.len();
        self.backlog = VecDeque::new();
        self.count_forwarded(count);
    }

    /// Closes the host's socket so that its other end sees end of file, not `ECONNRESET`, which
    /// Unix sockets give where something was left unread.
    pub(super) fn close(self) {
        let _ = shutdown(&self.stream, Shutdown::Both);
        let mut rest = [0; 16 << 10];
        while let Ok((1.., _)) = recv(&self.stream, &mut rest[..], RecvFlags::DONTWAIT) {}
    }

    fn end_writing(&self) {
        let _ = shutdown(&self.stream, Shutdown::Write);
    }

    fn count_forwarded(&mut self, count: usize) {
        // Lossless: a count is at most BUFFER_SIZE.
        self.forwarded += count as u32;
    }
}
