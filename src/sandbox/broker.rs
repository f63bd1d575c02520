//! The monitor's end of the vsock [broker](kiln_vmm::virtio::vsock::broker), within the runtime.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kiln_vmm::virtio::vsock::broker::Broker as Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::readable;

/// Connections to and from the guest.
#[derive(Debug)]
pub struct Broker {
    socket: Socket,
    readable: AsyncFd<OwnedFd>,
}

impl Broker {
    /// Takes the monitor's end. Must be called within the runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn new(socket: Socket) -> io::Result<Self> {
        let watched = socket.as_fd().try_clone_to_owned()?;
        Ok(Self { socket, readable: readable::register(watched)? })
    }

    /// A second descriptor of the socket, for who makes connections of its own.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn second(&self) -> io::Result<OwnedFd> {
        self.socket.as_fd().try_clone_to_owned()
    }

    /// Connects to a port of the guest, in blocking mode. A guest that refuses closes the
    /// connection.
    ///
    /// # Errors
    /// The device process is gone or doesn't take its packets.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        self.socket.try_connect(port)
    }

    /// The next connection that the guest makes, with the port of the host, or `None` when the
    /// device process has ended.
    ///
    /// # Errors
    /// The device process breaks the rules.
    pub async fn accept(&self) -> io::Result<Option<(u32, UnixStream)>> {
        self.readable.async_io(Interest::READABLE, |_| self.socket.try_accept()).await
    }
}
