//! JSON messages over `SOCK_SEQPACKET` Unix sockets, one a packet.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::readable;

/// Longest packet taken, in bytes; a longer one is an error, not cut off.
pub const MAX_PACKET: usize = 64 << 10;

/// Two connected sockets, closed on exec.
///
/// # Errors
/// No descriptors are left.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?)
}

/// Sends a message; waits while the socket is full.
///
/// # Errors
/// The other end has closed.
pub fn send_message(socket: BorrowedFd<'_>, message: &impl Serialize) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    send(socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL)?;
    Ok(())
}

/// Receives a message; `None` if the other end has closed.
///
/// # Errors
/// What came is no message, or too long for one.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    flags: MsgFlags,
) -> io::Result<Option<T>> {
    let mut buffer = vec![0; MAX_PACKET];
    // With MSG_TRUNC the true length is returned, however long the packet was.
    match recv(socket.as_raw_fd(), &mut buffer, flags | MsgFlags::MSG_TRUNC) {
        Ok(0) | Err(nix::Error::ECONNRESET) => Ok(None),
        Ok(length) => {
            let packet = buffer.get(..length).ok_or_else(|| {
                io::Error::new(io::ErrorKind::InvalidData, "packet exceeds the limit")
            })?;
            Ok(Some(serde_json::from_slice(packet)?))
        }
        Err(error) => Err(error.into()),
    }
}

/// A socket of a tokio task that receives messages.
#[derive(Debug)]
pub struct Receiver(AsyncFd<OwnedFd>);

impl Receiver {
    /// Takes a socket. Must be called within the runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(readable::register(socket)?))
    }

    /// The next message; see [`receive`].
    ///
    /// # Errors
    /// As [`receive`].
    pub async fn next<T: DeserializeOwned>(&self) -> io::Result<Option<T>> {
        self.0
            .async_io(Interest::READABLE, |socket| receive(socket.as_fd(), MsgFlags::MSG_DONTWAIT))
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::FromCommand;

    #[test]
    fn messages_keep_their_bounds_and_end_with_the_socket() {
        let (a, b) = pair().expect("pair");
        send_message(a.as_fd(), &FromCommand::Signal(15)).expect("sends");
        send_message(a.as_fd(), &FromCommand::Signal(2)).expect("sends");
        drop(a);
        let next = || receive(b.as_fd(), MsgFlags::empty()).expect("receives");
        assert_eq!(next(), Some(FromCommand::Signal(15)));
        assert_eq!(next(), Some(FromCommand::Signal(2)));
        assert_eq!(next(), None::<FromCommand>);
    }

    #[test]
    fn packets_above_the_limit_are_refused() {
        let (a, b) = pair().expect("pair");
        send_message(a.as_fd(), &"x".repeat(MAX_PACKET)).expect("sends");
        let error = receive::<String>(b.as_fd(), MsgFlags::empty()).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
