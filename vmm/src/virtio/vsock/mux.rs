//! The protocol: what each packet of the guest and each event of a host socket leads to.
//!
//! The mux knows nothing of queues. It is fed packets ([`Mux::receive`]) and host events
//! ([`Mux::poll_host`]), and asked for packets while the guest has room ([`Mux::transmit`]).

use std::collections::{HashSet, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{EventfdFlags, Timespec, epoll, eventfd};

use super::MAX_REPLIES;
use super::broker::Broker;
use super::connection::{Connection, Key, State};
use super::packet::{HOST_CID, Header, Op, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM};
use super::table::{Id, Table};
use crate::virtio::buffers::Bytes;

/// The numbers of the watched descriptors that are no connections.
const BROKER: Id = 0;
const WAKE: Id = 1;
const FIRST_CONNECTION: Id = 2;

const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// A packet without data that waits for a receive buffer of the guest.
#[derive(Debug, Clone, Copy)]
enum Control {
    /// Of a connection, whose credit is filled in when it is sent.
    Connection { id: Id, op: Op, flags: u32 },
    /// An answer to a packet that belongs to no connection any more.
    Reset(Header),
}

/// All connections and what waits for the guest.
#[derive(Debug)]
pub(super) struct Mux {
    guest_cid: u64,
    /// The host ports that can still be connected to.
    open_ports: HashSet<u32>,
    broker: Option<Broker>,
    broker_readable: bool,
    wake: OwnedFd,
    table: Table,
    control: VecDeque<Control>,
    /// Connections that have something for the guest and credit to send it, in turn.
    ready: VecDeque<Id>,
}

impl Mux {
    pub(super) fn new(
        guest_cid: u64,
        host_ports: impl IntoIterator<Item = u32>,
        broker: OwnedFd,
    ) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        rustix::io::ioctl_fionbio(&broker, true)?;
        epoll::add(&epoll, &broker, epoll::EventData::new_u64(BROKER), flags)?;
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        epoll::add(&epoll, &wake, epoll::EventData::new_u64(WAKE), flags)?;
        Ok(Self {
            guest_cid,
            open_ports: host_ports.into_iter().collect(),
            broker: Some(Broker::from(broker)),
            broker_readable: true,
            wake,
            table: Table::new(epoll, FIRST_CONNECTION),
            control: VecDeque::new(),
            ready: VecDeque::new(),
        })
    }

    /// Readable while a host socket has changed since [`Mux::poll_host`] was last called.
    pub(super) fn host_events(&self) -> BorrowedFd<'_> {
        self.table.epoll()
    }

    /// Makes [`Mux::host_events`] readable, so that work left undone is come back to.
    pub(super) fn wake(&self) {
        // Watched for edges, so it is never read; the counter can't fill up in a machine's life.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Forgets the guest. Ports that were connected to stay closed.
    pub(super) fn reset(&mut self) {
        self.table.end_all();
        self.control.clear();
        self.ready.clear();
    }

    /// Whether more packets may be taken from the guest: it has taken enough of the answers.
    pub(super) fn has_room(&self) -> bool {
        self.control.len() < MAX_REPLIES
    }

    /// Whether something waits for a receive buffer of the guest.
    pub(super) fn wants_to_transmit(&self) -> bool {
        !self.control.is_empty() || !self.ready.is_empty()
    }

    /// Takes note of everything that has happened on the host's sockets.
    pub(super) fn poll_host(&mut self) -> io::Result<()> {
        let mut events = Vec::with_capacity(64);
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            events.clear();
            match epoll::wait(
                self.table.epoll(),
                rustix::buffer::spare_capacity(&mut events),
                Some(&now),
            ) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            for event in &events {
                match event.data.u64() {
                    BROKER => self.broker_readable = true,
                    WAKE => {}
                    id => self.on_socket(id, event.flags),
                }
            }
            if events.len() < events.capacity() {
                return Ok(());
            }
        }
    }

    /// Takes the connections that the monitor wants made. Call it only while there is a driver, so
    /// that they wait for one.
    pub(super) fn take_from_broker(&mut self) {
        while self.broker_readable && self.has_room() {
            let Some(broker) = &self.broker else { return };
            match broker.try_receive() {
                Ok(Some((port, fd))) => self.request(port, UnixStream::from(fd)),
                Ok(None) => {
                    self.broker = None;
                    return;
                }
                Err(error) if error.raw_os_error() == Some(libc::EMFILE) => {
                    tracing::warn!(%error, "connection refused");
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => self.broker_readable = false,
                    io::ErrorKind::Interrupted => {}
                    io::ErrorKind::InvalidData => tracing::warn!(%error, "broker packet ignored"),
                    _ => {
                        tracing::error!(%error, "broker failed");
                        self.broker = None;
                    }
                },
            }
        }
    }

    /// Handles a packet of the guest. `payload` is everything behind the header.
    pub(super) fn receive(&mut self, header: &Header, mut payload: Bytes<'_>) {
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let ours = header.src_cid == self.guest_cid
            && header.dst_cid == HOST_CID
            && header.kind == TYPE_STREAM;
        if !ours {
            return self.refuse(header);
        }
        let length = header.len as usize;
        let op = Op::from_number(header.op)
            .filter(|op| length == 0 || *op == Op::Data)
            .filter(|_| length <= payload.len());
        let (id, op) = match (self.table.id(&key), op) {
            (Some(id), Some(op)) => (id, op),
            (Some(id), None) => return self.reset_connection(id, header),
            (None, Some(Op::Request)) => return self.accept(header, key),
            (None, _) => return self.refuse(header),
        };
        let Some(connection) = self.table.get(id) else { return };
        connection.learn_credit(header);
        match (op, connection.state) {
            (Op::Reset, _) => return self.table.end(id),
            (Op::Response, State::Requested) => connection.state = State::Established,
            (Op::Data, State::Established) if !connection.guest_sent_all => {
                let was_behind = connection.is_behind();
                if connection.forward(payload.take_front(length)).is_err() {
                    return self.reset_connection(id, header);
                }
                let is_behind = connection.is_behind();
                if connection.unread && connection.shutdown_told & SHUTDOWN_RECEIVE == 0 {
                    self.tell_shutdown(id, SHUTDOWN_RECEIVE);
                }
                if is_behind && !was_behind {
                    self.table.watch_backlog(id);
                }
            }
            (Op::Shutdown, State::Established) => return self.on_shutdown(id, header),
            (Op::CreditUpdate, State::Established) => {}
            (Op::CreditRequest, State::Established) => self.list_update(id),
            _ => return self.reset_connection(id, header),
        }
        self.consider(id);
    }

    /// The next packet for the guest, its data put into `room`, or `None` if there is nothing.
    pub(super) fn transmit(&mut self, room: &mut Bytes<'_>) -> Option<Header> {
        while let Some(control) = self.control.pop_front() {
            match control {
                Control::Reset(header) => return Some(header),
                Control::Connection { id, op, flags } => {
                    let Some(connection) = self.table.get(id) else { continue };
                    if op == Op::CreditUpdate {
                        connection.update_listed = false;
                    }
                    return Some(Self::header(self.guest_cid, connection, op, flags));
                }
            }
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.table.get(id) else { continue };
            connection.listed = false;
            if !connection.has_for_guest() {
                continue;
            }
            if connection.credit() == 0 {
                if !connection.credit_requested {
                    connection.credit_requested = true;
                    return Some(Self::header(self.guest_cid, connection, Op::CreditRequest, 0));
                }
                continue;
            }
            match connection.read_into(room) {
                Ok(0) => {
                    connection.readable = false;
                    let flags = if connection.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                    connection.unread |= connection.hung_up;
                    connection.shutdown_told |= flags;
                    let flags = connection.shutdown_told;
                    return Some(Self::header(self.guest_cid, connection, Op::Shutdown, flags));
                }
                Ok(count) => {
                    let mut header = Self::header(self.guest_cid, connection, Op::Data, 0);
                    header.len = count;
                    connection.listed = true;
                    self.ready.push_back(id);
                    return Some(header);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    self.consider(id);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    connection.readable = false;
                }
                Err(_) => {
                    // The host's end is gone in a rude way, which is an end all the same.
                    connection.hung_up = true;
                    connection.readable = false;
                    connection.unread = true;
                    connection.shutdown_told = SHUTDOWN_BOTH;
                    return Some(Self::header(
                        self.guest_cid,
                        connection,
                        Op::Shutdown,
                        SHUTDOWN_BOTH,
                    ));
                }
            }
        }
        None
    }

    /// The guest wants to connect to a host port.
    fn accept(&mut self, request: &Header, key: Key) {
        if self.table.is_full() || !self.open_ports.contains(&key.host_port) {
            return self.refuse(request);
        }
        match self.accept_from_monitor(key) {
            Ok(id) => {
                self.open_ports.remove(&key.host_port);
                if let Some(connection) = self.table.get(id) {
                    connection.learn_credit(request);
                }
                self.control.push_back(Control::Connection { id, op: Op::Response, flags: 0 });
            }
            Err(error) => {
                tracing::warn!(%error, port = key.host_port, "guest's connection refused");
                self.refuse(request);
            }
        }
    }

    fn accept_from_monitor(&mut self, key: Key) -> io::Result<Id> {
        let (ours, theirs) = UnixStream::pair()?;
        let id = self.table.insert(key, State::Established, ours)?;
        let broker = self.broker.as_ref().ok_or(io::ErrorKind::NotConnected);
        match broker
            .map_err(io::Error::from)
            .and_then(|b| b.try_send(key.host_port, theirs.as_fd()))
        {
            Ok(()) => Ok(id),
            Err(error) => {
                self.table.end(id);
                Err(error)
            }
        }
    }

    /// The monitor wants to connect to a guest port.
    fn request(&mut self, guest_port: u32, stream: UnixStream) {
        if self.table.is_full() {
            tracing::warn!(guest_port, "connection refused: there are too many");
            return;
        }
        let key = Key { host_port: self.table.free_port(guest_port), guest_port };
        match self.table.insert(key, State::Requested, stream) {
            Ok(id) => {
                self.control.push_back(Control::Connection { id, op: Op::Request, flags: 0 });
            }
            Err(error) => tracing::warn!(%error, guest_port, "connection refused"),
        }
    }

    fn on_socket(&mut self, id: Id, flags: epoll::EventFlags) {
        let Some(connection) = self.table.get(id) else { return };
        connection.readable = true;
        connection.hung_up |= flags.intersects(epoll::EventFlags::HUP | epoll::EventFlags::ERR);
        if connection.is_behind() {
            connection.flush();
            if !connection.is_behind() {
                self.table.watch_backlog(id);
            }
        }
        let Some(connection) = self.table.get(id) else { return };
        match connection.state {
            State::Ended => return self.table.end(id),
            State::Established
                if connection.hung_up && connection.shutdown_told == SHUTDOWN_SEND =>
            {
                connection.unread = true;
                connection.drop_backlog();
                self.tell_shutdown(id, SHUTDOWN_BOTH);
            }
            State::Established
                if connection.unread && connection.shutdown_told & SHUTDOWN_RECEIVE == 0 =>
            {
                self.tell_shutdown(id, SHUTDOWN_RECEIVE);
            }
            _ => {}
        }
        self.consider(id);
    }

    fn on_shutdown(&mut self, id: Id, header: &Header) {
        let Some(connection) = self.table.get(id) else { return };
        if header.flags & SHUTDOWN_RECEIVE != 0 {
            connection.finish_reading();
        }
        if header.flags & SHUTDOWN_SEND != 0 && !connection.guest_sent_all {
            connection.finish_writing();
        }
        if connection.guest_takes_none && connection.guest_sent_all {
            // The guest waits for this answer; what is still to be passed on needs no guest.
            return self.reset_connection(id, header);
        }
        self.consider(id);
    }

    /// Lists a connection wherever it has something to do.
    fn consider(&mut self, id: Id) {
        let Some(connection) = self.table.get(id) else { return };
        let can_ask = connection.credit() > 0 || !connection.credit_requested;
        if connection.has_for_guest() && can_ask && !connection.listed {
            connection.listed = true;
            self.ready.push_back(id);
        }
        if connection.owes_update() {
            self.list_update(id);
        }
    }

    fn list_update(&mut self, id: Id) {
        let Some(connection) = self.table.get(id) else { return };
        if connection.state == State::Established && !connection.update_listed {
            connection.update_listed = true;
            self.control.push_back(Control::Connection { id, op: Op::CreditUpdate, flags: 0 });
        }
    }

    fn tell_shutdown(&mut self, id: Id, flags: u32) {
        let Some(connection) = self.table.get(id) else { return };
        connection.shutdown_told |= flags;
        let flags = connection.shutdown_told;
        self.control.push_back(Control::Connection { id, op: Op::Shutdown, flags });
    }

    /// Ends a connection and says so in answer to a packet.
    fn reset_connection(&mut self, id: Id, packet: &Header) {
        self.table.end(id);
        self.refuse(packet);
    }

    /// Answers a packet with a reset, unless it is one.
    fn refuse(&mut self, packet: &Header) {
        if packet.op == Op::Reset as u16 {
            return;
        }
        self.control.push_back(Control::Reset(Header {
            src_cid: packet.dst_cid,
            dst_cid: self.guest_cid,
            src_port: packet.dst_port,
            dst_port: packet.src_port,
            kind: packet.kind,
            op: Op::Reset as u16,
            ..Header::default()
        }));
    }

    fn header(guest_cid: u64, connection: &mut Connection, op: Op, flags: u32) -> Header {
        let mut header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: connection.key.host_port,
            dst_port: connection.key.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            flags,
            ..Header::default()
        };
        connection.tell_credit(&mut header);
        header
    }
}
