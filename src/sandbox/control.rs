//! The monitor's control socket: how later commands reach a sandbox.
//!
//! `<root>/<id>/control` is a listening `SOCK_SEQPACKET` socket. A command connects, sends one
//! [`Request`] and gets one [`Reply`]; the monitor takes requests one at a time, so that those on
//! one container are serialised. Only who may enter the state directory may connect.
//!
//! A connection that has asked for [`Request::Exec`] stands for that process from then on: what it
//! sends is for the process, what it gets is about it, and its end is the process's.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, UnixAddr, accept4, connect, socket,
};
use serde::{Deserialize, Serialize};
use tokio::io::Interest;

use super::events::{Event, Sources};
use super::{packet, readable};
use crate::state::Container;

/// The socket's name in the state directory.
pub const NAME: &str = "control";

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
}

/// What the monitor answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// It is done.
    Done,
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
    /// Answers. A command that has gone misses it.
    pub fn answer(&self, reply: &Reply) {
        if let Err(error) = packet::send_message(self.0.as_fd(), reply) {
            tracing::debug!(%error, "a command has gone before its answer");
        }
    }
}

/// Asks the monitor of a container.
///
/// # Errors
/// The monitor can't be reached: it is about to end, or has ended.
pub fn ask(container: &Container, request: Request) -> io::Result<Reply> {
    let connection = reach(container)?;
    packet::send_message(connection.as_fd(), &request)?;
    let reply = packet::receive(connection.as_fd(), MsgFlags::empty())?;
    reply.ok_or_else(|| io::ErrorKind::ConnectionReset.into())
}

fn reach(container: &Container) -> io::Result<OwnedFd> {
    let directory = container.open()?;
    let name = Container::short_name(&directory, NAME);
    let kind = SockType::SeqPacket;
    let connection = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    connect(connection.as_raw_fd(), &UnixAddr::new(&name)?)?;
    Ok(connection)
}

impl Sources {
    /// Reports what commands ask of the sandbox through a listening socket.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_commands(&self, listener: OwnedFd) -> io::Result<()> {
        let listener = readable::register(listener)?;
        let sources = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                let next = listener.async_io(Interest::READABLE, |listener| {
                    let number = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
                    // SAFETY: the kernel has just made the descriptor for this process.
                    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(number) })
                });
                match next.await {
                    Ok(connection) => sources.serve(connection),
                    // The command has hung up, or this process has no descriptors left for now.
                    Err(error) => {
                        tracing::warn!(%error, "a command could not be answered");
                        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    }
                }
            }
        });
        Ok(())
    }

    fn serve(&self, connection: OwnedFd) {
        let connection = Arc::new(connection);
        let asker = Asker(Arc::clone(&connection));
        let receiver = connection.try_clone().and_then(packet::Receiver::new);
        let Ok(receiver) = receiver else { return };
        let sender = self.sender();
        tokio::task::spawn_local(async move {
            loop {
                match receiver.next().await {
                    Ok(Some(request)) => {
                        if sender.send(Event::Asked(request, asker.clone())).await.is_err() {
                            return;
                        }
                    }
                    Ok(None) => return,
                    Err(error) => {
                        asker.answer(&Reply::refusal(format!("unreadable request: {error}")));
                        return;
                    }
                }
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
            hooks: Default::default(),
        };
        dir.write(&record).expect("written");
        let listener = dir.listen(NAME).expect("listens");
        let container = crate::state::find(root.path(), &id).expect("there");
        let command =
            std::thread::spawn(move || ask(&container, Request::Signal { signal: 15, all: true }));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        tokio::task::LocalSet::new().block_on(&runtime.expect("runtime"), async {
            let (sources, mut events) = super::super::events::open();
            sources.watch_commands(listener).expect("watched");
            let Some(Event::Asked(request, asker)) = events.recv().await else {
                panic!("no request")
            };
            assert_eq!(request, Request::Signal { signal: 15, all: true });
            asker.answer(&Reply::refusal("no"));
        });
        let reply = command.join().expect("ends").expect("answered");
        assert_eq!(reply, Reply::Failed { message: "no".to_owned(), exit_code: 1 });
    }
}
