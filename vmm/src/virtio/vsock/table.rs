//! The connections of a device, by ports and by the number under which their sockets are watched.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::epoll;

use super::MAX_CONNECTIONS;
use super::connection::{Connection, Key, State};

/// The first of the ports from which the host connects. Lower ones are for services.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// Number of a connection, never used twice.
pub(super) type Id = u64;

/// Connections, watched edge-triggered: each change of a socket is reported once, so that one that
/// has to wait for the guest costs nothing meanwhile.
#[derive(Debug)]
pub(super) struct Table {
    epoll: OwnedFd,
    connections: HashMap<Id, Connection>,
    ids: HashMap<Key, Id>,
    next_id: Id,
    next_port: u32,
}

impl Table {
    /// A table whose sockets `epoll` watches under numbers from `first_id` on.
    pub(super) fn new(epoll: OwnedFd, first_id: Id) -> Self {
        Self {
            epoll,
            connections: HashMap::new(),
            ids: HashMap::new(),
            next_id: first_id,
            next_port: FIRST_EPHEMERAL_PORT,
        }
    }

    pub(super) fn epoll(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn is_full(&self) -> bool {
        self.connections.len() >= MAX_CONNECTIONS
    }

    /// Adds a connection and watches its socket.
    pub(super) fn insert(&mut self, key: Key, state: State, stream: UnixStream) -> io::Result<Id> {
        let id = self.next_id;
        epoll::add(&self.epoll, &stream, epoll::EventData::new_u64(id), interest(false))?;
        self.next_id += 1;
        self.connections.insert(id, Connection::new(key, state, stream));
        self.ids.insert(key, id);
        Ok(id)
    }

    /// A host port that is free towards a guest port.
    pub(super) fn free_port(&mut self, guest_port: u32) -> u32 {
        loop {
            let host_port = self.next_port;
            self.next_port = host_port
                .checked_add(1)
                .filter(|port| *port != u32::MAX)
                .unwrap_or(FIRST_EPHEMERAL_PORT);
            if !self.ids.contains_key(&Key { host_port, guest_port }) {
                return host_port;
            }
        }
    }

    pub(super) fn id(&self, key: &Key) -> Option<Id> {
        self.ids.get(key).copied()
    }

    pub(super) fn get(&mut self, id: Id) -> Option<&mut Connection> {
        self.connections.get_mut(&id)
    }

    /// Watches, or no longer watches, for the host to read.
    pub(super) fn watch_writable(&self, id: Id, connection: &UnixStream, on: bool) {
        let data = epoll::EventData::new_u64(id);
        if let Err(error) = epoll::modify(&self.epoll, connection, data, interest(on)) {
            tracing::warn!(%error, "can't watch a connection's socket");
        }
    }

    /// As [`Table::watch_writable`], for a connection of the table.
    pub(super) fn watch_backlog(&self, id: Id) {
        if let Some(connection) = self.connections.get(&id) {
            self.watch_writable(id, connection.stream(), connection.is_behind());
        }
    }

    /// Ends a connection: its ports are free again. What the guest has sent is still passed on.
    pub(super) fn end(&mut self, id: Id) {
        let Some(connection) = self.connections.get_mut(&id) else {
            return;
        };
        if connection.state != State::Ended {
            connection.state = State::Ended;
            self.ids.remove(&connection.key);
            connection.finish_reading();
            connection.finish_writing();
        }
        if !connection.is_behind() {
            self.remove(id);
        }
    }

    /// Ends all connections.
    pub(super) fn end_all(&mut self) {
        let ids: HashSet<Id> = self.connections.keys().copied().collect();
        for id in ids {
            self.end(id);
        }
    }

    fn remove(&mut self, id: Id) {
        if let Some(connection) = self.connections.remove(&id) {
            let _ = epoll::delete(&self.epoll, connection.stream());
            connection.close();
        }
    }
}

fn interest(writable: bool) -> epoll::EventFlags {
    let flags = epoll::EventFlags::IN | epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
    if writable { flags | epoll::EventFlags::OUT } else { flags }
}
