//! The loop: one thread, one device, one front-end.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};

use rustix::event::{PollFd, PollFlags, epoll, poll};
use rustix::net::{RecvFlags, SendFlags, recv, send};
use vhost::vhost_user::message::VhostUserHeaderFlag;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError, VhostUserVirtioFeatures};

use super::session::Session;
use crate::sync::lock;
use crate::virtio::VirtioDevice;

/// Numbers of what is waited for beside doorbells, whose numbers are their queues'.
const FRONT_END: u64 = 1 << 16;
const HOST: u64 = FRONT_END + 1;
const UNTIL: u64 = FRONT_END + 2;

/// Why a device can be served no more.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// An operating system resource.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The front-end broke the vhost-user protocol.
    #[error("vhost-user front-end: {0}")]
    Protocol(VhostError),
}

/// Serves `device` to the first front-end that connects to `listener`, until the other end of the
/// socket `until` is closed; a device without host events, at the longest until the front-end goes
/// away.
///
/// # Errors
/// A front-end that breaks the protocol, and resources that the host doesn't have.
pub fn serve(
    device: Box<dyn VirtioDevice>,
    listener: &UnixListener,
    until: BorrowedFd<'_>,
) -> Result<(), ServeError> {
    let Some(stream) = accept(listener, until)? else {
        return Ok(());
    };
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(host("epoll_create failed"))?;
    watch(&epoll, until, UNTIL, epoll::EventFlags::RDHUP)?;
    watch(&epoll, stream.as_fd(), FRONT_END, epoll::EventFlags::IN)?;
    if let Some(events) = device.host_events() {
        watch(&epoll, events, HOST, epoll::EventFlags::IN)?;
    }
    let doorbells = rustix::io::dup(&epoll).map_err(host("dup failed"))?;
    let session = Session::new(device, doorbells).map_err(ServeError::Protocol)?;
    let session = Arc::new(Mutex::new(session));
    let mut front_end = Some(BackendReqHandler::from_stream(stream, session.clone()));

    let mut events = Vec::with_capacity(16);
    loop {
        events.clear();
        match epoll::wait(&epoll, rustix::buffer::spare_capacity(&mut events), None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(host("epoll_wait failed")(error)),
        }
        for event in &events {
            match event.data.u64() {
                UNTIL => return Ok(()),
                HOST => lock(&session).on_host(),
                FRONT_END => {
                    let Some(handler) = &mut front_end else { continue };
                    if handle(handler, &session)? {
                        continue;
                    }
                    unwatch(&epoll, handler.as_raw_fd());
                    front_end = None;
                    let mut session = lock(&session);
                    session.disconnect();
                    if session.device.host_events().is_none() {
                        return Ok(());
                    }
                }
                queue => {
                    if let Ok(queue) = u16::try_from(queue) {
                        lock(&session).on_kick(queue);
                    }
                }
            }
        }
    }
}

/// Handles a message; false if the front-end is gone.
fn handle(
    handler: &mut BackendReqHandler<Mutex<Session>>,
    session: &Mutex<Session>,
) -> Result<bool, ServeError> {
    // SAFETY: the handler holds the socket open and outlives this.
    let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
    let header = peek(socket);
    match handler.handle_request() {
        Ok(()) => Ok(true),
        // The message layer does not pass a ring's enabling on before the driver's features are set,
        // and that is all it says so of. Neither does it answer: QEMU waits for that since version 8.2.
        Err(VhostError::InactiveFeature(VhostUserVirtioFeatures::PROTOCOL_FEATURES)) => {
            lock(session).enable_early();
            answer(socket, header)
        }
        // What the message layer says when the socket ends.
        Err(
            VhostError::Disconnected | VhostError::PartialMessage | VhostError::SocketBroken(_),
        ) => Ok(false),
        Err(error) => Err(ServeError::Protocol(error)),
    }
}

/// The request and the flags of the message that comes next, zeros if they are not there yet.
fn peek(socket: BorrowedFd<'_>) -> [u32; 2] {
    let mut bytes = [0; 8];
    match recv(socket, &mut bytes[..], RecvFlags::PEEK) {
        Ok((8, _)) => {
            let [a, b, c, d, e, f, g, h] = bytes;
            [u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h])]
        }
        // The message layer says what is wrong.
        _ => [0; 2],
    }
}

/// Tells the front-end that its message was heeded, if it wants to know; false if it is gone.
fn answer(socket: BorrowedFd<'_>, [request, flags]: [u32; 2]) -> Result<bool, ServeError> {
    const VERSION: u32 = 1;
    if flags & VhostUserHeaderFlag::NEED_REPLY.bits() == 0 {
        return Ok(true);
    }
    let flags = VERSION | VhostUserHeaderFlag::REPLY.bits();
    // Its size, and a number of 64 bits, 0 for success.
    let message = [request, flags, 8, 0, 0];
    let bytes: Vec<u8> = message.iter().flat_map(|word| word.to_ne_bytes()).collect();
    match send(socket, &bytes, SendFlags::NOSIGNAL) {
        Ok(_) => Ok(true),
        Err(rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET) => Ok(false),
        Err(error) => Err(host("send failed")(error)),
    }
}

/// Waits for a front-end; `None` is the end.
fn accept(
    listener: &UnixListener,
    until: BorrowedFd<'_>,
) -> Result<Option<UnixStream>, ServeError> {
    let failed = |source| ServeError::Host { what: "accept failed", source };
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::from_borrowed_fd(until, PollFlags::RDHUP),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(host("poll failed")(error)),
        }
        if !fds[1].revents().is_empty() {
            return Ok(None);
        }
        if !fds[0].revents().is_empty() {
            let (stream, _) = listener.accept().map_err(failed)?;
            stream.set_nonblocking(false).map_err(failed)?;
            return Ok(Some(stream));
        }
    }
}

fn watch(
    epoll: &OwnedFd,
    fd: BorrowedFd<'_>,
    number: u64,
    flags: epoll::EventFlags,
) -> Result<(), ServeError> {
    epoll::add(epoll, fd, epoll::EventData::new_u64(number), flags)
        .map_err(host("epoll_ctl failed"))
}

fn unwatch(epoll: &OwnedFd, socket: i32) {
    // SAFETY: the caller's handler holds the socket open.
    let socket = unsafe { BorrowedFd::borrow_raw(socket) };
    let _ = epoll::delete(epoll, socket);
}

fn host(what: &'static str) -> impl Fn(rustix::io::Errno) -> ServeError {
    move |error| ServeError::Host { what, source: error.into() }
}
