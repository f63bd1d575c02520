//! The monitor's control socket: how later commands reach a sandbox.
//!
//! `<root>/<id>/control` is a listening `SOCK_SEQPACKET` socket. A command connects, sends one
//! [`Request`] and gets one [`Reply`]; the monitor takes requests one at a time, so that those on
//! one container are serialised. Only who may enter the state directory may connect. What may be
//! long comes as a [`document`].
//!
//! A connection that has asked for [`Request::Exec`] stands for that process from then on: what it
//! sends is for the process ([`FromCommand`]), what it gets is about it, and its end is the
//! process's.

use std::cell::Cell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::{ExecId, ExitStatus, GuestProcess, WindowSize};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, accept4, connect, socket,
};
use rustix::net::sockopt::Timeout;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::sync::mpsc::Sender;

use super::events::{Event, Sources};
use super::{FromCommand, packet, readable};
use crate::state::Container;

/// The socket's name in the state directory.
pub const NAME: &str = "control";

/// The status of a command whose exec can't be begun, as runc has it.
pub const EXEC_REFUSED: u8 = 255;

/// What a command asks of the monitor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Execute the program of the created container.
    Start,
    /// Send a signal to the container's first process, or to all of its processes.
    Signal {
        /// Its number, 1 to 64.
        signal: i32,
        /// To all of them.
        all: bool,
    },
    /// The `process` of the container's configuration, as a document.
    Process,
    /// What the monitor knows by itself: an [`Inspection`](super::inspection::Inspection), as a
    /// document.
    Inspect,
    /// Execute a further program: an OCI `process` object that comes as a document.
    Exec(Exec),
    /// Have all of its processes stand still.
    Pause,
    /// Let them go on.
    Resume,
    /// Which processes there are: [`Processes`], as a document.
    Processes,
    /// The figures of the container's cgroup: [`Statistics`](kiln_protocol::Statistics), as a
    /// document.
    Statistics,
    /// Tell on this connection whenever processes were killed for want of memory.
    Watch,
    /// Take another container into the machine: a [`Join`](super::pod::Join) that comes as a document,
    /// and the mount namespace that its paths are of.
    Join,
    /// Change its limits: an OCI `linux.resources` object that comes as a document.
    Update,
}

/// The processes of a container.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processes {
    /// On the host, those that stand for the container and its execs.
    pub host: Vec<i32>,
    /// In the guest.
    pub guest: Vec<GuestProcess>,
}

/// How a further program is executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// The process on the host that stands for it.
    pub proxy: i32,
    /// It has a terminal of this size.
    pub terminal: Option<WindowSize>,
    /// In a paused container too: it begins when that is resumed.
    pub ignore_paused: bool,
}

/// What the monitor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
    /// It is in the document that comes with this.
    Document,
    /// To who watches: processes were killed for want of memory.
    OomKilled,
    /// Of an exec: its streams come with this.
    Streams {
        /// Behind them comes the [`Budget`](super::budget::Budget) that they count against.
        limited: bool,
    },
    /// Of an exec: its program runs.
    Started,
    /// Of an exec: its program has ended. Output may still come.
    Ended(ExitStatus),
    /// To the monitor of a container that was taken in: a [`Membership`](super::pod::Membership) that
    /// comes as a document, the connection, and the broker's socket.
    Joined,
    /// It can't be done, or went wrong.
    Failed {
        /// Why.
        message: String,
        /// The status for the command to exit with, not 0.
        exit_code: u8,
    },
}

impl Reply {
    /// A refusal with runc's usual status.
    pub fn refusal(message: impl Into<String>) -> Self {
        Self::Failed { message: message.into(), exit_code: 1 }
    }
}

/// A command that waits for its answer.
#[derive(Debug, Clone)]
pub struct Asker(Arc<OwnedFd>);

impl Asker {
    /// Answers. A command that has gone, or doesn't read, misses it.
    pub fn answer(&self, reply: &Reply) {
        self.answer_with(reply, &[]);
    }

    /// Whether the command has gone.
    pub fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(self.0.as_fd(), PollFlags::empty())];
        let hung_up = PollFlags::POLLHUP | PollFlags::POLLERR;
        matches!(poll(&mut polled, PollTimeout::ZERO), Ok(1..))
            && polled[0].revents().is_some_and(|events| events.intersects(hung_up))
    }

    /// Answers with descriptors.
    pub fn answer_with(&self, reply: &Reply, descriptors: &[OwnedFd]) {
        if let Err(error) = packet::send_with(self.0.as_fd(), reply, descriptors) {
            tracing::debug!(%error, "a command has gone before its answer");
        }
    }
}

/// Asks the monitor of a container. Descriptors may go with the request and come with the reply.
///
/// # Errors
/// The monitor can't be reached: it is about to end, or has ended.
pub fn ask(
    container: &Container,
    request: Request,
    descriptors: &[OwnedFd],
) -> io::Result<(Reply, Vec<OwnedFd>)> {
    let connection = reach(container)?;
    packet::send_with(connection.as_fd(), &request, descriptors)?;
    let reply = packet::receive_with(connection.as_fd(), MsgFlags::empty())?;
    reply.ok_or_else(|| io::ErrorKind::ConnectionReset.into())
}

/// Connects to the monitor of a container.
///
/// # Errors
/// As [`ask`].
pub fn reach(container: &Container) -> io::Result<OwnedFd> {
    reach_within(container, None)
}

/// The same; a monitor that takes no connections is waited for no longer than `patience`, to the
/// microsecond.
///
/// # Errors
/// As [`ask`]; `WouldBlock` for one that takes none.
pub fn reach_within(container: &Container, patience: Option<Duration>) -> io::Result<OwnedFd> {
    let directory = container.open()?;
    let name = Container::short_name(&directory, NAME);
    let kind = SockType::SeqPacket;
    let connection = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    if let Some(patience) = patience {
        rustix::net::sockopt::set_socket_timeout(&connection, Timeout::Send, Some(patience))?;
    }
    connect(connection.as_raw_fd(), &UnixAddr::new(&name)?)?;
    Ok(connection)
}

/// Numbers for execs.
#[derive(Debug, Clone, Default)]
struct Numbers(Rc<Cell<u32>>);

impl Numbers {
    /// One that was never given.
    fn next(&self) -> Option<ExecId> {
        let number = self.0.get();
        self.0.set(number.checked_add(1)?);
        Some(ExecId(number))
    }
}

impl Sources {
    /// Reports what commands ask of the sandbox through a listening socket.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_commands(&self, listener: OwnedFd) -> io::Result<()> {
        let listener = readable::register(listener)?;
        let (sources, numbers) = (self.clone(), Numbers::default());
        tokio::task::spawn_local(async move {
            loop {
                let next = listener.async_io(Interest::READABLE, |listener| {
                    let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
                    // SAFETY: the kernel has just made the descriptor for this process.
                    Ok(unsafe { OwnedFd::from_raw_fd(number) })
                });
                match next.await {
                    Ok(connection) => sources.serve(connection, numbers.clone()),
                    // The command has hung up, or this process has no descriptors left for now.
                    Err(error) => {
                        tracing::warn!(%error, "a command could not be answered");
                        tokio::time::sleep(Duration::from_millis(20)).await;
                    }
                }
            }
        });
        Ok(())
    }

    fn serve(&self, connection: OwnedFd, numbers: Numbers) {
        let connection = Arc::new(connection);
        let asker = Asker(Arc::clone(&connection));
        let receiver = connection.try_clone().and_then(packet::Receiver::new);
        let Ok(receiver) = receiver else { return };
        let sender = self.sender();
        tokio::task::spawn_local(async move {
            loop {
                let (request, descriptors) = match receiver.next_with().await {
                    Ok(Some(received)) => received,
                    Ok(None) => return,
                    Err(error) => {
                        asker.answer(&Reply::refusal(format!("unreadable request: {error}")));
                        return;
                    }
                };
                let event = match request {
                    Request::Exec(how) => {
                        let Some(exec) = numbers.next() else {
                            return asker.answer(&Reply::refusal("no numbers are left for execs"));
                        };
                        let event = Event::ExecAsked { exec, how, descriptors, asker };
                        if sender.send(event).await.is_ok() {
                            stand_for(exec, receiver, sender).await;
                        }
                        return;
                    }
                    request => Event::Asked { request, descriptors, asker: asker.clone() },
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
    }
}

/// Reports what a connection has for the process that it stands for, and its end.
async fn stand_for(exec: ExecId, connection: packet::Receiver, sender: Sender<Event>) {
    loop {
        let event = match connection.next::<FromCommand>().await {
            Ok(Some(message)) => Event::ExecTold(exec, message),
            Ok(None) | Err(_) => Event::ExecGone(exec),
        };
        let is_end = matches!(event, Event::ExecGone(_));
        if sender.send(event).await.is_err() || is_end {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::document;
    use crate::state::{Record, StateDir, Status};
    use std::path::PathBuf;

    #[test]
    fn requests_reach_the_monitor_and_answers_the_command() {
        let root = tempfile::tempdir().expect("temporary directory");
        let id = "long".repeat(40);
        let dir = StateDir::create(root.path(), &id).expect("free");
        let record = Record {
            oci_version: "1.2.0".to_owned(),
            id: id.clone(),
            status: Status::Created,
            monitor: crate::state::Monitor::this().expect("proc"),
            bundle: PathBuf::new(),
            rootfs: PathBuf::new(),
            created: String::new(),
            owner: String::new(),
            annotations: Default::default(),
            engine: "kvm".to_owned(),
            kept: true,
            cgroup: Default::default(),
            network: None,
            hooks: Default::default(),
            end: None,
        };
        dir.write(&record).expect("written");
        let listener = dir.listen(NAME).expect("listens");
        let container = crate::state::find(root.path(), &id).expect("there");
        let command = std::thread::spawn(move || {
            ask(&container, Request::Signal { signal: 15, all: true }, &[])
        });
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), async {
            let (sources, mut events) = super::super::events::open();
            sources.watch_commands(listener).expect("watched");
            let Some(Event::Asked { request, asker, .. }) = events.recv().await else {
                panic!("no request")
            };
            assert_eq!(request, Request::Signal { signal: 15, all: true });
            asker.answer(&Reply::refusal("no"));
        });
        let (reply, _) = command.join().expect("ends").expect("answered");
        assert_eq!(reply, Reply::Failed { message: "no".to_owned(), exit_code: 1 });
    }

    #[test]
    fn connection_that_asked_for_an_exec_stands_for_it() {
        let (ours, theirs) = packet::pair().expect("pair");
        let how = Exec { proxy: 1, terminal: None, ignore_paused: false };
        let process = document::write(&"process").expect("document");
        packet::send_with(ours.as_fd(), &Request::Exec(how), &[process]).expect("sent");
        packet::send_with(ours.as_fd(), &FromCommand::Signal(15), &[]).expect("sent");
        drop(ours);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), async {
            let (sources, mut events) = super::super::events::open();
            sources.serve(theirs, Numbers::default());
            let Some(Event::ExecAsked { exec, descriptors, .. }) = events.recv().await else {
                panic!("no exec")
            };
            assert_eq!(document::read(descriptors).expect("read").get(), "\"process\"");
            let told = events.recv().await;
            assert!(matches!(told, Some(Event::ExecTold(e, FromCommand::Signal(15))) if e == exec));
            assert!(matches!(events.recv().await, Some(Event::ExecGone(e)) if e == exec));
        });
    }
}
