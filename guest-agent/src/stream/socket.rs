//! vsock connections with the host.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrLike, SockaddrStorage, VsockAddr, accept4,
    bind, connect, getpeername, listen as listen_on, socket,
};

/// The host's context id.
const HOST: u32 = libc::VMADDR_CID_HOST;

/// Attempts to reach the host, and the pause between them: the device may still be settling.
const ATTEMPTS: usize = 50;
const PAUSE: Duration = Duration::from_millis(100);

/// Receive buffer of a connection in bytes: what the host may have under way.
const RECEIVE_BUFFER: u64 = 1 << 20;

/// Options of linux/vm_sockets.h.
const SO_VM_SOCKETS_BUFFER_SIZE: libc::c_int = 0;
const SO_VM_SOCKETS_BUFFER_MAX_SIZE: libc::c_int = 2;

/// Connects to a port of the host.
///
/// # Errors
/// The last attempt's, after five seconds.
pub fn connect_to_host(port: u32) -> io::Result<OwnedFd> {
    let mut attempt = 1;
    loop {
        let socket = vsock()?;
        match connect(socket.as_raw_fd(), &VsockAddr::new(HOST, port)) {
            Ok(()) => return Ok(socket),
            Err(error) if attempt == ATTEMPTS => return Err(error.into()),
            Err(_) => std::thread::sleep(PAUSE),
        }
        attempt += 1;
    }
}

/// Listens on a port of the guest; the listener does not block.
///
/// # Errors
/// `EADDRINUSE` if something else has it.
pub fn listen(port: u32) -> io::Result<OwnedFd> {
    let socket = vsock()?;
    // Accepted connections inherit their buffer's size.
    set_buffer(socket.as_fd())?;
    bind(socket.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, port))?;
    // A connection that does not fit is refused, and the host may ask for many processes at once.
    listen_on(&socket, Backlog::MAXCONN)?;
    super::relay::make_non_blocking(&socket)?;
    Ok(socket)
}

/// Accepts a connection, non-blocking. One that another process of the guest has opened gives
/// `None`: streams come from the host alone.
///
/// # Errors
/// `WouldBlock` if there is none.
pub fn accept_from_host(listener: BorrowedFd<'_>) -> io::Result<Option<OwnedFd>> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let accepted = accept4(listener.as_raw_fd(), flags)?;
    // SAFETY: accept4 gave a new descriptor that nothing else owns.
    let accepted = unsafe { OwnedFd::from_raw_fd(accepted) };
    let peer: SockaddrStorage = getpeername(accepted.as_raw_fd())?;
    let local = peer.family() == Some(AddressFamily::Vsock)
        && peer.as_vsock_addr().is_none_or(|peer| peer.cid() != HOST);
    Ok((!local).then_some(accepted))
}

fn vsock() -> io::Result<OwnedFd> {
    Ok(socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?)
}

fn set_buffer(socket: BorrowedFd<'_>) -> io::Result<()> {
    let size = RECEIVE_BUFFER;
    for option in [SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE] {
        // SAFETY: the option takes a u64, which lives for the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::AF_VSOCK,
                option,
                (&raw const size).cast(),
                size_of::<u64>() as libc::socklen_t,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
