//! How connections travel between the monitor and the vsock device.
//!
//! The vsock device runs in a jail without a file system or a network, so both ways of making a
//! connection are one passing of a descriptor over a `SOCK_SEQPACKET` Unix socket, the *broker*
//! socket.
//!
//! # Wire format
//! Each packet is 4 bytes, a port number, little-endian, with exactly one descriptor
//! (`SCM_RIGHTS`): a connected Unix stream socket that is the host's end of a vsock connection.
//! * monitor to device: connect this socket to that port of the guest. A connection that the guest
//!   refuses, or for which the device has no room, shows as end of file on the socket.
//! * device to monitor: the guest has connected to that host port. The device sends this for the
//!   ports of [`VsockConfig::host_ports`](crate::config::VsockConfig::host_ports) only, and for each
//!   of them once in its life.
//!
//! There are no answers. End of file means that the other process has ended.
//!
//! # Trust
//! The device's process may be in the guest's hands. The monitor takes from it packets of exactly
//! this form, with a descriptor that really is a Unix stream socket, and nothing else.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags,
    SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg,
    sendmsg, socketpair,
};

/// One end of a broker socket: the monitor's, through which it connects to the guest and accepts
/// the guest's connections, or the device's. The socket does not block.
#[derive(Debug)]
pub struct Broker {
    socket: OwnedFd,
}

impl Broker {
    /// Makes a broker socket; the second end is for the device
    /// ([`VsockConfig::broker`](crate::config::VsockConfig::broker)). Both are closed on exec.
    ///
    /// # Errors
    /// No descriptors left.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (monitor, device) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok((Self { socket: monitor }, device))
    }

    /// Connects to a port of the guest. The connection can be written to at once; what the guest
    /// has not accepted yet waits in the socket. The stream returned is in blocking mode.
    ///
    /// # Errors
    /// `WouldBlock` if the device is behind with its work (wait until the broker is writable),
    /// `BrokenPipe` or `ConnectionReset` if its process has ended.
    pub fn try_connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.try_send(port, theirs.as_fd())?;
        Ok(ours)
    }

    /// The next connection that the guest has made, with the host port it is for, or `None` once
    /// the device's process has ended. The stream returned is in non-blocking mode.
    ///
    /// # Errors
    /// `WouldBlock` if there is none (wait until the broker is readable), `InvalidData` if the
    /// device sent something else than a connection.
    pub fn try_accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        let Some((port, fd)) = self.try_receive()? else {
            return Ok(None);
        };
        if socket_type(&fd)? != SocketType::STREAM || socket_domain(&fd)? != AddressFamily::UNIX {
            return Err(invalid("the descriptor is no unix stream socket"));
        }
        let stream = UnixStream::from(fd);
        stream.set_nonblocking(true)?;
        Ok(Some((port, stream)))
    }

    /// As [`Broker::try_connect`], waiting while the device is behind with its work.
    ///
    /// # Errors
    /// As there, but for `WouldBlock`.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        self.wait_while_blocked(PollFlags::OUT, || self.try_send(port, theirs.as_fd()))?;
        Ok(ours)
    }

    /// As [`Broker::try_accept`], waiting for a connection.
    ///
    /// # Errors
    /// As there, but for `WouldBlock`.
    pub fn accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        self.wait_while_blocked(PollFlags::IN, || self.try_accept())
    }

    /// Passes a connection on.
    pub(super) fn try_send(&self, port: u32, stream: BorrowedFd<'_>) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [stream];
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
            return Err(io::Error::from(io::ErrorKind::OutOfMemory));
        }
        let bytes = port.to_le_bytes();
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Takes a packet; `None` is end of file. `EMFILE` if this process may have no more descriptors.
    pub(super) fn try_receive(&self) -> io::Result<Option<(u32, OwnedFd)>> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [0; 5];
        let received = recvmsg(
            &self.socket,
            &mut [IoSliceMut::new(&mut bytes)],
            &mut control,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 && fds.is_empty() {
            return Ok(None);
        }
        if fds.is_empty() && received.flags.contains(ReturnFlags::CTRUNC) {
            // What came found no room among this process's own: the packet is lost.
            return Err(rustix::io::Errno::MFILE.into());
        }
        if received.bytes != 4
            || received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC)
        {
            return Err(invalid("the packet is not 4 bytes with one descriptor"));
        }
        let (Some(fd), true) = (fds.pop(), fds.is_empty()) else {
            return Err(invalid("the packet has not exactly one descriptor"));
        };
        let [a, b, c, d, _] = bytes;
        Ok(Some((u32::from_le_bytes([a, b, c, d]), fd)))
    }

    fn wait_while_blocked<T>(
        &self,
        flags: PollFlags,
        mut attempt: impl FnMut() -> io::Result<T>,
    ) -> io::Result<T> {
        loop {
            match attempt() {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => return other,
            }
            match poll(&mut [PollFd::new(&self.socket, flags)], None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl From<OwnedFd> for Broker {
    /// Takes an end that was made by [`Broker::pair`].
    fn from(socket: OwnedFd) -> Self {
        Self { socket }
    }
}

impl AsFd for Broker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn invalid(reason: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    fn pair() -> (Broker, Broker) {
        let (monitor, device) = Broker::pair().expect("socketpair");
        (monitor, Broker::from(device))
    }

    #[test]
    fn connections_pass_both_ways() {
        let (monitor, device) = pair();
        let mut ours = monitor.connect(1025).expect("connects");
        let (port, fd) = device.try_receive().expect("receives").expect("a packet");
        assert_eq!(port, 1025);
        ours.write_all(b"down").expect("writes");
        let mut theirs = UnixStream::from(fd);
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).expect("reads");
        assert_eq!(&bytes, b"down");

        let (mut guest, host) = UnixStream::pair().expect("pair");
        device.try_send(u32::MAX, host.as_fd()).expect("sends");
        drop(host);
        let (port, mut accepted) = monitor.accept().expect("accepts").expect("a connection");
        assert_eq!(port, u32::MAX);
        guest.write_all(b"up").expect("writes");
        drop(guest);
        let mut text = String::new();
        accepted.read_to_string(&mut text).expect("reads");
        assert_eq!(text, "up");
    }

    #[test]
    fn nothing_to_accept_would_block_and_the_end_is_none() {
        let (monitor, device) = pair();
        let error = monitor.try_accept().expect_err("nothing there");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        drop(device);
        assert!(monitor.try_accept().expect("end of file").is_none());
    }

    #[test]
    fn what_is_no_connection_is_refused() {
        let (monitor, device) = pair();
        let refused = || monitor.try_accept().expect_err("refused").kind();

        rustix::net::send(&device.socket, &[1, 2, 3, 4], SendFlags::empty()).expect("sends");
        assert_eq!(refused(), io::ErrorKind::InvalidData);

        rustix::net::send(&device.socket, &[1; 6], SendFlags::empty()).expect("sends");
        assert_eq!(refused(), io::ErrorKind::InvalidData);

        let file = tempfile::tempfile().expect("file");
        device.try_send(1, file.as_fd()).expect("sends");
        assert!(monitor.try_accept().is_err());

        let (_other, seqpacket) = Broker::pair().expect("pair");
        device.try_send(1, seqpacket.as_fd()).expect("sends");
        assert_eq!(refused(), io::ErrorKind::InvalidData);
    }
}
