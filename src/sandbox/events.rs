//! Everything that can happen to a sandbox, or to the process that stands for an exec, from all
//! sources, in one channel.
//!
//! Each source is a task that waits for one descriptor. The channel is bounded, so a source that
//! talks faster than the monitor listens waits in its own socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use kiln_protocol::frame::{Decoder, FrameError};
use kiln_protocol::{CONTROL_PORT, ExecId, FromAgent, MAX_FROM_AGENT};
use kiln_vmm::config::VmmEvent;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use tokio::io::{AsyncReadExt, Interest};
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::FromCommand;
use super::agent_stream::AgentStream;
use super::broker::Broker;
use super::control::{Asker, Exec, Reply, Request};
use super::deadline::Deadline;
use super::machine::Role;
use super::pod::PodEvent;
use super::{packet, readable};

/// Room for events that the monitor has not looked at yet.
const CAPACITY: usize = 64;

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// The agent has connected.
    AgentConnected(UnixStream),
    /// The agent has sent a message.
    AgentSaid(FromAgent),
    /// The agent's connection has ended, by an error of its own if one is given.
    AgentGone(Option<String>),
    /// A process of the machine has something to say.
    Vmm(Role, VmmEvent),
    /// A process of the machine has ended.
    ProcessEnded(Role),
    /// The process that serves vsock does not keep to the broker's rules.
    BrokerFailed(io::Error),
    /// A process wrote to standard error, or the guest to its console.
    Output(Role, Vec<u8>),
    /// The command has something to say.
    Command(FromCommand),
    /// The command has ended.
    CommandGone,
    /// A later command asks for something.
    Asked {
        /// What.
        request: Request,
        /// What came with the request.
        descriptors: Vec<OwnedFd>,
        /// Who.
        asker: Asker,
    },
    /// A later command asks for a program to be executed.
    ExecAsked {
        /// Its number.
        exec: ExecId,
        /// How.
        how: Exec,
        /// What came with the request.
        descriptors: Vec<OwnedFd>,
        /// The connection that stands for it.
        asker: Asker,
    },
    /// The process that stands for an exec has something for it.
    ExecTold(ExecId, FromCommand),
    /// The process that stands for an exec has ended.
    ExecGone(ExecId),
    /// To a process that stands for an exec, or for a container of a pod: its monitor, or its sandbox's,
    /// has something to say, or, if there is nothing, has ended.
    Monitor(io::Result<Option<(Reply, Vec<OwnedFd>)>>),
    /// Something happens to another container of the pod.
    Pod(PodEvent),
    /// The container was to be killed, and the guest has had time enough for that.
    KillOverdue,
    /// Kills for want of memory are to be counted on the host.
    OomUncounted,
    /// The agent was to answer the question of this number, and has had time enough for that.
    AnswerOverdue(u32),
    /// The agent was to execute a program, and has had time enough for that.
    ExecOverdue(ExecId),
    /// The host's wall clock was set, or has gone on after a suspend.
    ClockWasSet,
    /// Somebody sent the monitor itself this signal.
    Signal(i32),
    /// More has come out of stdio streams than the step may write.
    OutputExceeded,
    /// A stdio stream has been copied to its end.
    StreamEnded,
}

/// The sending end that sources get.
#[derive(Debug, Clone)]
pub struct Sources(Sender<Event>);

/// A channel for all sources.
pub fn open() -> (Sources, Receiver<Event>) {
    let (sender, receiver) = channel(CAPACITY);
    (Sources(sender), receiver)
}

impl Sources {
    /// Reports something after a while, of which only that counts in which this process could act.
    pub fn tell_after(&self, limit: Duration, event: Event) {
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            Deadline::after(limit).passed().await;
            let _ = sender.send(event).await;
        });
    }

    /// For threads and tasks that report by themselves.
    pub fn sender(&self) -> Sender<Event> {
        self.0.clone()
    }

    /// Reports the agent's connection. Later ones are closed at once: nothing that is started in
    /// the guest after the agent may pose as it.
    pub fn watch_broker(&self, broker: std::rc::Rc<Broker>) {
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            let mut agent_connected = false;
            loop {
                let event = match broker.accept().await {
                    Ok(Some((CONTROL_PORT, stream))) if !agent_connected => {
                        agent_connected = true;
                        Event::AgentConnected(stream)
                    }
                    Ok(Some(_)) => continue,
                    // The process has ended, which its own source reports.
                    Ok(None) => return,
                    Err(error) => Event::BrokerFailed(error),
                };
                let failed = matches!(event, Event::BrokerFailed(_));
                if sender.send(event).await.is_err() || failed {
                    return;
                }
            }
        });
    }

    /// Reports what the agent sends.
    pub fn watch_agent(&self, stream: AgentStream) {
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            let mut decoder = Decoder::new(MAX_FROM_AGENT);
            let mut buffer = vec![0; 16 << 10];
            loop {
                let length = match stream.read(&mut buffer).await {
                    Ok(0) | Err(_) => {
                        let cut = decoder.is_mid_frame().then(|| "it was cut short".to_owned());
                        let _ = sender.send(Event::AgentGone(cut)).await;
                        return;
                    }
                    Ok(length) => length,
                };
                decoder.push(&buffer[..length]);
                if let Err(error) = report_messages(&mut decoder, &sender).await {
                    let error = format!("{:#}", anyhow::Error::new(error));
                    let _ = sender.send(Event::AgentGone(Some(error))).await;
                    return;
                }
            }
        });
    }

    /// Reports what a process sends over its control socket.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_control(&self, role: Role, socket: OwnedFd) -> io::Result<()> {
        let receiver = packet::Receiver::new(socket)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            loop {
                let event = match receiver.next().await {
                    Ok(Some(event)) => Event::Vmm(role, event),
                    // The process has ended, or is as good as that: its end is reported.
                    Ok(None) => return,
                    Err(error) => {
                        let message = format!("unreadable control message: {error}");
                        Event::Vmm(role, VmmEvent::Failed { message })
                    }
                };
                if sender.send(event).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Reports a process's end once.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_process(&self, role: Role, pidfd: OwnedFd) -> io::Result<()> {
        let pidfd = readable::register(pidfd)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            if pidfd.readable().await.is_ok() {
                let _ = sender.send(Event::ProcessEnded(role)).await;
            }
        });
        Ok(())
    }

    /// Reports what comes out of a pipe.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_output(&self, role: Role, pipe: OwnedFd) -> io::Result<()> {
        let mut pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(pipe)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            let mut buffer = vec![0; 4096];
            while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
                let output = Event::Output(role, buffer[..length].to_vec());
                if sender.send(output).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Reports what the command says, and its end.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_command(&self, socket: OwnedFd) -> io::Result<()> {
        let receiver = packet::Receiver::new(socket)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            while let Ok(Some(message)) = receiver.next().await {
                if sender.send(Event::Command(message)).await.is_err() {
                    return;
                }
            }
            let _ = sender.send(Event::CommandGone).await;
        });
        Ok(())
    }

    /// Reports what the monitor answers, and its end.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn watch_monitor(&self, connection: OwnedFd) -> io::Result<()> {
        let receiver = packet::Receiver::new(connection)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            loop {
                let reply = receiver.next_with().await;
                let is_last = !matches!(reply, Ok(Some(_)));
                if sender.send(Event::Monitor(reply)).await.is_err() || is_last {
                    return;
                }
            }
        });
        Ok(())
    }

    /// Reports the signals of a set, which are blocked. Those that the kernel sent are left out
    /// unless `of_kernel` is set: those of the terminal reach the command too, which passes them on.
    ///
    /// # Errors
    /// The runtime can't watch them.
    pub fn watch_signals(&self, signals: &SigSet, of_kernel: bool) -> io::Result<()> {
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(signals, flags)?;
        let readable = readable::register(second(&signals)?)?;
        let sender = self.0.clone();
        tokio::task::spawn_local(async move {
            loop {
                let next = readable.async_io(Interest::READABLE, |_| {
                    signals.read_signal()?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
                });
                let Ok(info) = next.await else { return };
                let number = i32::try_from(info.ssi_signo).unwrap_or_default();
                let from_kernel = info.ssi_code == libc::SI_KERNEL;
                if (of_kernel || !from_kernel) && sender.send(Event::Signal(number)).await.is_err()
                {
                    return;
                }
            }
        });
        Ok(())
    }
}

async fn report_messages(decoder: &mut Decoder, sender: &Sender<Event>) -> Result<(), FrameError> {
    while let Some(message) = decoder.next()? {
        if sender.send(Event::AgentSaid(message)).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The signals that are passed on to a container: every one that can be, but those that are about
/// the process that gets them.
fn forwarded_signals() -> SigSet {
    let own = [
        Signal::SIGKILL,
        Signal::SIGSTOP,
        Signal::SIGCHLD,
        Signal::SIGURG,
        Signal::SIGPIPE,
        Signal::SIGWINCH,
        Signal::SIGSEGV,
        Signal::SIGBUS,
        Signal::SIGILL,
        Signal::SIGFPE,
        Signal::SIGTRAP,
        Signal::SIGABRT,
        Signal::SIGSYS,
        Signal::SIGTSTP,
        Signal::SIGTTIN,
        Signal::SIGTTOU,
        Signal::SIGCONT,
    ];
    Signal::iterator().filter(|signal| !own.contains(signal)).collect()
}

/// Whether a signal ends a process that has no use for it.
pub fn ends_programs(signal: i32) -> bool {
    matches!(signal, libc::SIGHUP | libc::SIGINT | libc::SIGQUIT | libc::SIGTERM)
}

/// The signals that are taken in: the forwarded ones, and with a terminal of one's own the changes of
/// its size.
pub fn watched_signals(with_size: bool) -> SigSet {
    let mut signals = forwarded_signals();
    if with_size {
        signals.add(Signal::SIGWINCH);
    }
    signals
}

/// Makes a second descriptor of a process's pidfd.
///
/// # Errors
/// No descriptors are left.
pub fn second(fd: impl AsFd) -> io::Result<OwnedFd> {
    fd.as_fd().try_clone_to_owned()
}
