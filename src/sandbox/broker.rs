//! The host's side of vsock: connections are handed over as descriptors.
//!
//! The broker is a `SOCK_SEQPACKET` Unix socket to the process that serves the guest's vsock device.
//! A packet is a port, 32 bits little-endian, with one descriptor: a connected Unix stream socket.
//! Sent to the device it means "connect this to that port of the guest"; received from it, "the
//! guest connected to that port of the host".

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::cmsg_space;
use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The monitor's end of the broker.
#[derive(Debug)]
pub struct Broker(AsyncFd<OwnedFd>);

impl Broker {
    /// Takes the monitor's end. Must be called within the runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        Ok(Self(AsyncFd::with_interest(socket, Interest::READABLE)?))
    }

    /// Connects to a port of the guest. A guest that refuses closes the connection.
    ///
    /// # Errors
    /// The device process is gone or doesn't take its packets.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (own, device) = UnixStream::pair()?;
        let fds = [device.as_raw_fd()];
        sendmsg::<()>(
            self.0.get_ref().as_raw_fd(),
            &[IoSlice::new(&port.to_le_bytes())],
            &[ControlMessage::ScmRights(&fds)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )?;
        Ok(own)
    }

    /// The next connection that the guest makes, with the port of the host, or `None` when the device process has ended.
    ///
    /// # Errors
    /// The device process breaks the rules.
    pub async fn accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        self.0.async_io(Interest::READABLE, receive).await
    }
}

fn receive(socket: &OwnedFd) -> io::Result<Option<(u32, UnixStream)>> {
    let mut port = [0; 4];
    let mut space = cmsg_space!(RawFd);
    let mut slices = [IoSliceMut::new(&mut port)];
    let message = recvmsg::<()>(
        socket.as_fd().as_raw_fd(),
        &mut slices,
        Some(&mut space),
        MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let length = message.bytes;
    let whole = !message.flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC);
    let mut received = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control {
            // SAFETY: the kernel has just made these descriptors for this process.
            received.extend(fds.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    if length == 0 && received.is_empty() {
        return Ok(None);
    }
    match received.pop() {
        Some(fd) if whole && length == port.len() && received.is_empty() => {
            Ok(Some((u32::from_le_bytes(port), UnixStream::from(fd))))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "malformed broker packet")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::packet;
    use nix::sys::socket::send;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_io().build().expect("runtime")
    }

    #[test]
    fn connections_go_both_ways() {
        runtime().block_on(async {
            let (monitor, device) = packet::pair().expect("pair");
            let (monitor, device) =
                (Broker::new(monitor).expect("new"), Broker::new(device).expect("new"));
            let _stream = monitor.connect(1025).expect("connects");
            let (port, _) = device.accept().await.expect("accepts").expect("a connection");
            assert_eq!(port, 1025);
            drop(monitor);
            assert!(device.accept().await.expect("ends").is_none());
        });
    }

    #[test]
    fn packets_without_a_connection_are_refused() {
        runtime().block_on(async {
            for bytes in [&b"\0\0\0\0"[..], b"\0", b"\0\0\0\0\0\0\0\0"] {
                let (monitor, device) = packet::pair().expect("pair");
                send(device.as_raw_fd(), bytes, MsgFlags::empty()).expect("sends");
                let broker = Broker::new(monitor).expect("new");
                assert!(broker.accept().await.is_err(), "{bytes:?}");
            }
        });
    }
}
