//! Requests to the kernel over route netlink (rtnetlink(7)), one after the other.
//!
//! kiln asks the same two things on the host and in the guest: change this and say whether it worked
//! ([`Connection::change`]), and list all of those ([`Connection::list`]). What a message says is
//! `netlink-packet-route`'s business; this is the conversation around it. It blocks: the kernel answers
//! at once, and the agent has no runtime to wait with.
//!
//! # Promises
//! A connection belongs to the network namespace that its thread was in when it was opened, wherever
//! the thread goes later. A list is whole: one that the kernel had to interrupt is asked for again. An
//! error has the kernel's own explanation where it gave one.

mod answer;

use std::io;
use std::os::fd::OwnedFd;

use netlink_packet_core::{
    DecodeError, Emitable, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkBuffer, Parseable,
};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, connect, netlink, recv, send,
    socket_with,
};

use answer::{HEADER, Part};

/// Bytes of one datagram: the kernel makes them as long as the receiver's buffer, up to 32 KiB.
const DATAGRAM: usize = 64 << 10;

/// How often a list is asked for that changes while it is being read.
const ATTEMPTS: usize = 16;

/// Why the kernel did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It refused.
    #[error("{errno}{}", .reason.as_deref().map(|reason| format!(" ({reason})")).unwrap_or_default())]
    Refused {
        /// The error number.
        errno: io::Error,
        /// Its explanation.
        reason: Option<String>,
    },
    /// The socket failed.
    #[error("netlink socket: {0}")]
    Socket(#[from] io::Error),
    /// The answer can't be read.
    #[error("netlink answer: {0}")]
    Malformed(#[from] DecodeError),
    /// The list changed each time it was read.
    #[error("netlink list changes faster than it can be read")]
    Unsteady,
}

impl Error {
    /// The error number with which the kernel refused.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { errno, .. } => errno.raw_os_error(),
            _ => None,
        }
    }
}

/// A connection to the kernel's network configuration, in one network namespace.
#[derive(Debug)]
pub struct Connection {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Connection {
    /// Opens a connection to the calling thread's network namespace.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        // No protocol is the first, NETLINK_ROUTE.
        let (family, flags) = (AddressFamily::NETLINK, SocketFlags::CLOEXEC);
        let socket = socket_with(family, SocketType::RAW, flags, None)?;
        answer::explain(&socket)?;
        // From now on only the kernel is listened to.
        connect(&socket, &netlink::SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; DATAGRAM] })
    }

    /// Has something changed: `kind` is the message's type, `flags` those beside the usual ones.
    ///
    /// # Errors
    /// The kernel refused, see [`Error`].
    pub fn change(&mut self, kind: u16, flags: u16, body: &impl Emitable) -> Result<(), Error> {
        self.ask(kind, flags | NLM_F_ACK, body)?;
        loop {
            for part in self.hear()? {
                if let Part::End(result) = part {
                    return result;
                }
            }
        }
    }

    /// Lists everything that `kind`, a request for a list, and `body`, which narrows it down, say.
    ///
    /// # Errors
    /// See [`Error`].
    pub fn list<T: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        body: &impl Emitable,
    ) -> Result<Vec<T>, Error> {
        for _ in 0..ATTEMPTS {
            if let Some(list) = self.list_once(kind, body)? {
                return Ok(list);
            }
        }
        Err(Error::Unsteady)
    }

    /// `None` for a list that the kernel had to interrupt.
    fn list_once<T: Parseable<[u8]>>(
        &mut self,
        kind: u16,
        body: &impl Emitable,
    ) -> Result<Option<Vec<T>>, Error> {
        self.ask(kind, NLM_F_DUMP, body)?;
        let (mut list, mut whole) = (Vec::new(), true);
        loop {
            for part in self.hear()? {
                match part {
                    Part::Item(item) => list.push(T::parse(&item)?),
                    Part::Interrupted => whole = false,
                    Part::End(result) => {
                        result?;
                        return Ok(whole.then_some(list));
                    }
                }
            }
        }
    }

    fn ask(&mut self, kind: u16, flags: u16, body: &impl Emitable) -> Result<(), Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = HEADER + body.buffer_len();
        let mut message = vec![0; length];
        let mut header = NetlinkBuffer::new(&mut message);
        header.set_length(u32::try_from(length).map_err(io::Error::other)?);
        header.set_message_type(kind);
        header.set_flags(flags | NLM_F_REQUEST);
        header.set_sequence_number(self.sequence);
        body.emit(&mut message[HEADER..]);
        send(&self.socket, &message, SendFlags::empty()).map_err(io::Error::from)?;
        Ok(())
    }

    /// Waits for the next datagram of the answer to the last request.
    fn hear(&mut self) -> Result<Vec<Part>, Error> {
        let length = loop {
            match recv(&self.socket, &mut self.buffer[..], RecvFlags::TRUNC) {
                Ok((_, length)) => break length,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        };
        let Some(datagram) = self.buffer.get(..length) else {
            return Err(io::Error::other("a datagram longer than the buffer").into());
        };
        answer::parts(datagram, self.sequence)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use netlink_packet_route::link::{LinkAttribute, LinkMessage};
    use nix::sched::{CloneFlags, unshare};

    /// The names of the links in a namespace.
    fn links(connection: &mut Connection) -> Vec<String> {
        let list: Vec<LinkMessage> =
            connection.list(libc::RTM_GETLINK, &LinkMessage::default()).expect("a list");
        let names = list.into_iter().flat_map(|link| link.attributes);
        names
            .filter_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name),
                _ => None,
            })
            .collect()
    }

    #[test]
    fn a_connection_stays_in_the_namespace_it_was_opened_in() {
        let namespace = || unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        namespace();
        let mut connection = Connection::open().expect("opens");
        namespace();
        assert!(links(&mut connection).contains(&"lo".to_owned()));
        let mut up = LinkMessage::default();
        up.header.index = 1;
        up.header.flags = netlink_packet_route::link::LinkFlags::Up;
        up.header.change_mask = up.header.flags;
        connection.change(libc::RTM_NEWLINK, 0, &up).expect("lo is brought up");
    }

    #[test]
    fn a_refusal_has_a_number_and_is_over_with() {
        unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
        let mut connection = Connection::open().expect("opens");
        let mut nothing = LinkMessage::default();
        nothing.header.index = 4711;
        let error = connection.change(libc::RTM_NEWLINK, 0, &nothing).expect_err("no such link");
        assert_eq!(error.errno(), Some(libc::ENODEV), "{error}");
        assert!(links(&mut connection).contains(&"lo".to_owned()));
    }
}
