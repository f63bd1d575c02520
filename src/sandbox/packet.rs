//! JSON messages over `SOCK_SEQPACKET` Unix sockets, one a packet, some with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recv,
    recvmsg, send, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::readable;

/// Longest packet taken, in bytes; a longer one is an error, not cut off.
pub const MAX_PACKET: usize = 64 << 10;

/// The most descriptors that come with a message; one with more is an error.
pub const MAX_DESCRIPTORS: usize = 4;

/// The most that the kernel sends with a message (`SCM_MAX_FD`): so many are received, and closed if
/// they are too many.
const SENDABLE: usize = 253;

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

/// Sends a message with descriptors, at most [`MAX_DESCRIPTORS`]; doesn't wait.
///
/// # Errors
/// The other end has closed, or doesn't read (`WouldBlock`).
pub fn send_with(
    socket: BorrowedFd<'_>,
    message: &impl Serialize,
    descriptors: &[OwnedFd],
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message)?;
    let numbers: Vec<RawFd> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&numbers)];
    let control = if numbers.is_empty() { &[][..] } else { &rights[..] };
    let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
    sendmsg::<()>(socket.as_raw_fd(), &[IoSlice::new(&bytes)], control, flags, None)?;
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
            let packet = buffer.get(..length).ok_or_else(|| invalid("packet exceeds the limit"))?;
            Ok(Some(serde_json::from_slice(packet)?))
        }
        Err(error) => Err(error.into()),
    }
}

/// Receives a message and the descriptors that came with it, closed on exec; `None` if the other
/// end has closed. For sockets whose other end is trusted with descriptors.
///
/// # Errors
/// What came is no message, too long for one, or has too many descriptors.
pub fn receive_with<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
    flags: MsgFlags,
) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut buffer = vec![0; MAX_PACKET];
    let mut control = nix::cmsg_space!([RawFd; SENDABLE]);
    let mut parts = [IoSliceMut::new(&mut buffer)];
    let flags = flags | MsgFlags::MSG_CMSG_CLOEXEC;
    let received = recvmsg::<()>(socket.as_raw_fd(), &mut parts, Some(&mut control), flags);
    let received = match received {
        Err(nix::Error::ECONNRESET) => return Ok(None),
        other => other?,
    };
    let (length, cut) = (received.bytes, received.flags);
    if cut.contains(MsgFlags::MSG_CTRUNC) {
        // There is room for all that can be sent: what is cut is for want of descriptors.
        return Err(nix::Error::EMFILE.into());
    }
    let mut descriptors = Vec::new();
    for message in received.cmsgs()? {
        if let ControlMessageOwned::ScmRights(numbers) = message {
            // SAFETY: the kernel has just made each of them for this process.
            descriptors.extend(numbers.iter().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if cut.contains(MsgFlags::MSG_TRUNC) || descriptors.len() > MAX_DESCRIPTORS {
        return Err(invalid("packet exceeds the limit"));
    }
    if length == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(&buffer[..length])?, descriptors)))
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
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

    /// The next message with its descriptors; see [`receive_with`].
    ///
    /// # Errors
    /// As [`receive_with`].
    pub async fn next_with<T: DeserializeOwned>(&self) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
        let receive = |socket: &OwnedFd| receive_with(socket.as_fd(), MsgFlags::MSG_DONTWAIT);
        self.0.async_io(Interest::READABLE, receive).await
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
    fn descriptors_come_with_their_message_and_too_many_are_refused() {
        use std::io::{Read, Write};

        let (a, b) = pair().expect("pair");
        let (mut reader, writer) = io::pipe().expect("pipe");
        send_with(a.as_fd(), &"pipe", &[writer.into()]).expect("sends");
        let received = receive_with::<String>(b.as_fd(), MsgFlags::empty()).expect("receives");
        let (text, mut descriptors) = received.expect("a message");
        assert_eq!((text.as_str(), descriptors.len()), ("pipe", 1));
        let mut sent = std::fs::File::from(descriptors.remove(0));
        sent.write_all(b"through").expect("writes");
        drop(sent);
        let mut text = String::new();
        reader.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "through");

        send_with(a.as_fd(), &"none", &[]).expect("sends");
        let received = receive_with::<String>(b.as_fd(), MsgFlags::empty()).expect("receives");
        assert!(received.is_some_and(|(_, descriptors)| descriptors.is_empty()));

        let many: Vec<OwnedFd> = (0..9).map(|_| b.try_clone().expect("descriptor")).collect();
        send_with(a.as_fd(), &"many", &many).expect("sends");
        let error = receive_with::<String>(b.as_fd(), MsgFlags::empty()).expect_err("refused");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
        drop(a);
        let end = receive_with::<String>(b.as_fd(), MsgFlags::empty()).expect("receives");
        assert!(end.is_none());
    }

    #[test]
    fn packets_above_the_limit_are_refused() {
        let (a, b) = pair().expect("pair");
        send_message(a.as_fd(), &"x".repeat(MAX_PACKET)).expect("sends");
        let error = receive::<String>(b.as_fd(), MsgFlags::empty()).expect_err("too long");
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
