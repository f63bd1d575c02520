//! What the agent does about each event.

mod answers;
mod launching;
mod reports;

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kiln_protocol::{FromAgent, StreamToken, ToAgent, VERSION, WindowSize};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::container::Container;
use super::control::Control;
use super::poll::{Interest, Poller};
use super::process::{Process, ProcessName};
use super::relays::Relays;
use super::streams::{Endpoint, Pair, Streams};
use super::supplies::Environment;
use crate::cgroup::Hierarchy;
use crate::console;
use crate::rootfs::terminal;
use crate::stream::Relay;

/// Tokens of what exists once. All tokens from `FIRST_RELAY` upwards belong to relays; in between,
/// to processes' channels and to connections whose header is awaited.
const SIGNALS: u64 = 0;
const CONTROL: u64 = 1;
const CONTROL_OUT: u64 = 2;
const LISTENER: u64 = 3;
const FIRST_CHANNEL: u64 = 1 << 16;
const FIRST_CGROUP: u64 = 1 << 32;
const FIRST_MEMORY: u64 = 1 << 36;
const FIRST_HEADER: u64 = 1 << 40;
const FIRST_RELAY: u64 = 1 << 48;

/// How often the end of killed processes is looked for when all is over, and the pause in between.
const END_ATTEMPTS: usize = 1000;
const END_PAUSE: std::time::Duration = std::time::Duration::from_millis(1);

/// Why the loop ended.
#[derive(Debug)]
pub enum Ending {
    /// The host asked for it.
    Shutdown,
    /// The control connection ended, or broke.
    Disconnected(io::Error),
}

/// The agent.
#[derive(Debug)]
pub struct Agent {
    environment: Environment,
    hierarchy: Hierarchy,
    poller: Poller,
    signals: SignalFd,
    control: Control,
    /// A second descriptor of the control connection, to be polled for writing.
    control_out: OwnedFd,
    streams: Streams,
    relays: Relays,
    containers: HashMap<String, Container>,
    /// Processes that there have been.
    launched: u64,
    welcomed: bool,
}

impl Agent {
    /// An agent that talks over `control` and accepts streams on `listener`. The calling thread's
    /// SIGCHLD is blocked from here on.
    ///
    /// # Errors
    /// As epoll_ctl(2) and signalfd(2).
    pub fn new(
        environment: Environment,
        hierarchy: Hierarchy,
        control: OwnedFd,
        listener: OwnedFd,
    ) -> io::Result<Self> {
        let mut children = SigSet::empty();
        children.add(Signal::SIGCHLD);
        children.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        let signals = SignalFd::with_flags(&children, flags)?;
        let (control_out, control) = (control.try_clone()?, Control::new(control)?);
        let (poller, streams) = (Poller::new()?, Streams::new(listener));
        poller.watch(&signals, SIGNALS)?;
        poller.watch(control.socket(), CONTROL)?;
        poller.add(&control_out, CONTROL_OUT)?;
        poller.watch(streams.listener(), LISTENER)?;
        Ok(Self {
            environment,
            hierarchy,
            poller,
            signals,
            control,
            control_out,
            streams,
            relays: Relays::new(FIRST_RELAY),
            containers: HashMap::new(),
            launched: 0,
            welcomed: false,
        })
    }

    /// Says hello and serves the host until it has enough. Then nothing of any container is left.
    pub fn run(mut self) -> Ending {
        let served = self.serve();
        self.end_containers();
        match served {
            Ok(()) => Ending::Shutdown,
            Err(error) => Ending::Disconnected(error),
        }
    }

    /// Kills all containers and waits until their processes are gone, but not for one that the kernel
    /// doesn't let go.
    fn end_containers(&mut self) {
        for container in self.containers.values() {
            // What can't be killed ends with the guest.
            let _ = container.cgroup.kill();
        }
        for _ in 0..END_ATTEMPTS {
            // SAFETY: reaps any child; its status is not asked for.
            match unsafe { libc::waitpid(-1, std::ptr::null_mut(), libc::WNOHANG) } {
                ..0 => break,
                0 => std::thread::sleep(END_PAUSE),
                _ => {}
            }
        }
        self.containers.clear();
    }

    fn serve(&mut self) -> io::Result<()> {
        let kernel = rustix::system::uname().release().to_string_lossy().into_owned();
        let version = env!("CARGO_PKG_VERSION").to_owned();
        self.send(&FromAgent::Hello { protocol: VERSION, version, kernel })?;
        loop {
            for token in self.poller.wait()? {
                match token {
                    SIGNALS => self.reap()?,
                    CONTROL => {
                        for message in self.control.receive()? {
                            if matches!(message, ToAgent::Shutdown) {
                                return Ok(());
                            }
                            self.on_message(message)?;
                        }
                    }
                    CONTROL_OUT => self.flush()?,
                    LISTENER => self.accept()?,
                    FIRST_RELAY.. => self.relays.on_event(&self.poller, token)?,
                    FIRST_HEADER.. => self.read_header(token - FIRST_HEADER)?,
                    FIRST_MEMORY.. => self.on_memory_token(token - FIRST_MEMORY)?,
                    FIRST_CGROUP.. => self.on_cgroup_token(token - FIRST_CGROUP)?,
                    _ => self.on_channel(token)?,
                }
            }
        }
    }

    fn send(&mut self, message: &FromAgent) -> io::Result<()> {
        self.control.send(message)?;
        self.await_room()
    }

    fn flush(&mut self) -> io::Result<()> {
        self.control.flush()?;
        self.await_room()
    }

    fn await_room(&mut self) -> io::Result<()> {
        if self.control.is_congested() {
            self.poller.arm(&self.control_out, CONTROL_OUT, Interest::Write)?;
        }
        Ok(())
    }

    fn on_message(&mut self, message: ToAgent) -> io::Result<()> {
        let is_welcome = matches!(message, ToAgent::Welcome { .. });
        if is_welcome == self.welcomed {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "one welcome comes first"));
        }
        match message {
            ToAgent::Welcome { protocol, unix_time_ns, entropy } => {
                if protocol != VERSION {
                    let why = format!("the host speaks protocol {protocol}, this is {VERSION}");
                    return Err(io::Error::new(io::ErrorKind::InvalidData, why));
                }
                self.welcomed = true;
                (self.environment.set_clock)(unix_time_ns);
                (self.environment.credit_entropy)(entropy);
                console::say(format_args!("welcomed"));
                Ok(())
            }
            ToAgent::SetClock { unix_time_ns } => {
                (self.environment.set_clock)(unix_time_ns);
                Ok(())
            }
            ToAgent::Create(create) => self.create(&create),
            ToAgent::Start { container, network } => self.start(&container, network.as_deref()),
            ToAgent::Signal { container, exec, signal, all } => {
                self.signal(&ProcessName { container, exec }, signal, all);
                Ok(())
            }
            ToAgent::Resize { container, exec, size } => {
                self.resize(&ProcessName { container, exec }, size);
                Ok(())
            }
            ToAgent::Exec(exec) => self.exec(&exec),
            ToAgent::Ask { request, container, question } => {
                self.ask(request, &container, &question)
            }
            // The loop ends before a shutdown comes here.
            ToAgent::Shutdown => Ok(()),
        }
    }

    /// A process that isn't there (any more) takes no signal.
    fn signal(&self, name: &ProcessName, signal: i32, all: bool) {
        let Some(container) = self.containers.get(&name.container) else {
            return;
        };
        if !all {
            if let Some(process) = container.process(name.exec) {
                process.signal(signal);
            }
            return;
        }
        if signal == libc::SIGKILL && container.cgroup.kill().is_ok() {
            return;
        }
        for pid in container.cgroup.processes().unwrap_or_default() {
            // SAFETY: plain numbers; a process of the cgroup that has ended meanwhile can only be
            // replaced by another of the guest's.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn resize(&mut self, name: &ProcessName, size: WindowSize) {
        let master = self.process_mut(name).and_then(|process| process.terminal.as_ref());
        if let Some(master) = master {
            // A terminal that has hung up has no size to change.
            let _ = terminal::resize(master.as_fd(), size);
        }
    }

    fn process_mut(&mut self, name: &ProcessName) -> Option<&mut Process> {
        self.containers.get_mut(&name.container)?.process_mut(name.exec)
    }

    /// A container whose first process has not ended.
    fn living(&mut self, container: &str) -> Option<&mut Container> {
        self.containers.get_mut(container).filter(|container| container.ended.is_none())
    }

    /// The process that has a property.
    fn find(&self, wanted: impl Fn(&Process) -> bool) -> Option<ProcessName> {
        self.containers.iter().find_map(|(container, processes)| {
            let exec = processes.find(&wanted)?;
            Some(ProcessName { container: container.clone(), exec })
        })
    }

    fn accept(&mut self) -> io::Result<()> {
        let Some(id) = self.streams.accept()? else {
            return Ok(());
        };
        match self.streams.awaiting_header(id) {
            Some(connection) => self.poller.watch(connection, FIRST_HEADER + id),
            None => Ok(()),
        }
    }

    fn read_header(&mut self, id: u64) -> io::Result<()> {
        let Some((token, connection)) = self.streams.read_header(id) else {
            return Ok(());
        };
        self.poller.forget(&connection);
        match self.streams.connected(token, connection) {
            Some(pair) => self.join(pair),
            None => Ok(()),
        }
    }

    fn offer(
        &mut self,
        token: StreamToken,
        name: &ProcessName,
        endpoint: Endpoint,
    ) -> io::Result<()> {
        match self.streams.offered(token, name, endpoint) {
            Some(pair) => self.join(pair),
            None => Ok(()),
        }
    }

    fn join(&mut self, Pair { process, endpoint, connection }: Pair) -> io::Result<()> {
        let (poller, relays) = (&self.poller, &mut self.relays);
        match endpoint {
            Endpoint::Output(pipe) => {
                relays.start(poller, Relay::from_pipe(pipe, connection), None)
            }
            Endpoint::Input(pipe) => {
                relays.start(poller, Relay::to_process(connection, pipe), Some(&process))
            }
            Endpoint::Terminal(master) => {
                let input = Relay::to_process(connection.try_clone()?, master.try_clone()?);
                relays.start(poller, Relay::from_terminal(master, connection), None)?;
                relays.start(poller, input, Some(&process))
            }
        }
    }
}
