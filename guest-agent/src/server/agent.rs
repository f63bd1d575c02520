//! What the agent does about each event.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kiln_protocol::{
    Answer, CreateContainer, FailurePhase, FromAgent, StreamToken, ToAgent, VERSION, WindowSize,
};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::control::Control;
use super::poll::{Interest, Poller};
use super::relays::Relays;
use super::running::{Running, State, exit_status};
use super::streams::{Endpoint, Pair, Streams};
use super::supplies::{self, Environment};
use crate::cgroup::Hierarchy;
use crate::console;
use crate::container::channel::{Command, Report};
use crate::container::{Plan, launch};
use crate::failure::{During, Failure};
use crate::rootfs::terminal;
use crate::stream::{Relay, make_non_blocking};

/// Tokens of what exists once. All tokens from `FIRST_RELAY` upwards belong to relays; in between,
/// to containers' channels and to connections whose header is awaited.
const SIGNALS: u64 = 0;
const CONTROL: u64 = 1;
const CONTROL_OUT: u64 = 2;
const LISTENER: u64 = 3;
const FIRST_CHANNEL: u64 = 1 << 16;
const FIRST_HEADER: u64 = 1 << 40;
const FIRST_RELAY: u64 = 1 << 48;

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
    containers: HashMap<String, Running>,
    /// Containers whose failure has been reported, until their first process is reaped.
    failed: Vec<Running>,
    created: u64,
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
            failed: Vec::new(),
            created: 0,
            welcomed: false,
        })
    }

    /// Says hello and serves the host until it has enough. Then nothing of any container is left.
    pub fn run(mut self) -> Ending {
        let served = self.serve();
        self.containers.clear();
        self.failed.clear();
        match served {
            Ok(()) => Ending::Shutdown,
            Err(error) => Ending::Disconnected(error),
        }
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
                (self.environment.welcome)(unix_time_ns, entropy);
                console::say(format_args!("welcomed"));
                Ok(())
            }
            ToAgent::Create(create) => self.create(&create),
            ToAgent::Start { container } => self.start(container),
            ToAgent::Signal { container, exec: None, signal, all } => {
                self.signal(&container, signal, all);
                Ok(())
            }
            ToAgent::Resize { container, exec: None, size } => {
                self.resize(&container, size);
                Ok(())
            }
            // There is no such exec (any more).
            ToAgent::Signal { .. } | ToAgent::Resize { .. } => Ok(()),
            ToAgent::Exec(exec) => self.send(&FromAgent::ExecFailed {
                container: exec.container,
                exec: exec.exec,
                phase: FailurePhase::Exec,
                message: "this agent has no exec".to_owned(),
                exit_code: 255,
            }),
            ToAgent::Ask { request, .. } => {
                let why = "this agent answers no questions".to_owned();
                self.send(&FromAgent::Answer { request, answer: Answer::Refused(why) })
            }
            // The loop ends before a shutdown comes here.
            ToAgent::Shutdown => Ok(()),
        }
    }

    fn create(&mut self, create: &CreateContainer) -> io::Result<()> {
        let container = &create.container;
        console::say(format_args!("{container}: setting up"));
        if self.containers.contains_key(container) {
            let failure = Failure::config(format!("container {container:?} exists already"));
            return self.send(&failed(container, failure));
        }
        if let Err(failure) = self.launch(create) {
            if self.containers.contains_key(container) {
                return self.on_failed(container, failure);
            }
            self.streams.cancel(&supplies::tokens(&create.stdio));
            console::say(format_args!("{container}: {failure}"));
            return self.send(&failed(container, failure));
        }
        Ok(())
    }

    fn launch(&mut self, create: &CreateContainer) -> Result<(), Failure> {
        let container = create.container.as_str();
        let plan = Plan::new(create, self.environment.cpus)?;
        self.created += 1;
        let unique = self.created;
        let (supplies, devices) = supplies::gather(&self.environment, &plan, unique)?;
        let (ends, endpoints) = supplies::pipes(&create.stdio, &plan)?;
        let cgroup = self
            .hierarchy
            .create()
            .during(FailurePhase::Cgroups, || "create the container's cgroup")?;
        let launched = launch::launch(&plan, supplies, ends, &cgroup)?;
        let channel_token = FIRST_CHANNEL + unique;
        let running = Running {
            pid: launched.pid,
            state: State::Creating,
            channel: None,
            channel_token,
            plan,
            cgroup,
            terminal: None,
            tokens: supplies::tokens(&create.stdio),
            _devices: devices,
        };
        let registered = self.poller.watch(launched.channel.socket(), channel_token);
        let running = Running { channel: Some(launched.channel), ..running };
        self.containers.insert(container.to_owned(), running);
        registered.during(FailurePhase::Process, || "watch the set-up channel")?;
        for (token, endpoint) in endpoints {
            self.offer(token, container, endpoint)
                .during(FailurePhase::Stdio, || "connect the streams")?;
        }
        Ok(())
    }

    fn start(&mut self, container: String) -> io::Result<()> {
        let refused = match self.containers.get_mut(&container) {
            Some(running) if running.state == State::Created => {
                running.state = State::Starting;
                // If the process is gone, its end is reported as any other.
                if let Some(channel) = &running.channel {
                    let _ = channel.command(Command::Execute);
                }
                return Ok(());
            }
            Some(_) => "is not waiting to be started",
            None => "does not exist",
        };
        let failure =
            Failure::new(FailurePhase::Exec, format!("container {container:?} {refused}"));
        self.send(&failed(&container, failure))
    }

    fn signal(&mut self, container: &str, signal: i32, all: bool) {
        let Some(running) = self.containers.get(container) else {
            return;
        };
        if all && signal == libc::SIGKILL && running.cgroup.kill().is_ok() {
            return;
        }
        let processes = match all {
            true => running.cgroup.processes().unwrap_or_default(),
            false => vec![running.pid],
        };
        for pid in processes {
            // SAFETY: plain numbers; the first process is not reaped as long as it is listed here, and
            // a process of the cgroup that has ended meanwhile can only be replaced by another of the
            // guest's.
            unsafe { libc::kill(pid, signal) };
        }
    }

    fn resize(&mut self, container: &str, size: WindowSize) {
        let master = self.containers.get(container).and_then(|running| running.terminal.as_ref());
        if let Some(master) = master {
            // A terminal that has hung up has no size to change.
            let _ = terminal::resize(master.as_fd(), size);
        }
    }

    /// Reads what a container's first process reports.
    fn on_channel(&mut self, token: u64) -> io::Result<()> {
        let of_token = |(_, running): &(&String, &Running)| running.channel_token == token;
        let found = self.containers.iter().find(of_token);
        let Some(container) = found.map(|(container, _)| container.clone()) else {
            return Ok(());
        };
        self.read_reports(&container)
    }

    fn read_reports(&mut self, container: &str) -> io::Result<()> {
        loop {
            let Some(running) = self.containers.get_mut(container) else {
                return Ok(());
            };
            let Some(channel) = &running.channel else {
                return Ok(());
            };
            match channel.take_report() {
                Ok(Some((Report::Ready, master))) => self.on_ready(container, master)?,
                Ok(Some((Report::Failed(failure), _))) => self.on_failed(container, failure)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Ok(None) | Err(_) => {
                    running.channel = None;
                    if running.state == State::Starting {
                        running.state = State::Running;
                        let container = container.to_owned();
                        console::say(format_args!("{container}: started"));
                        self.send(&FromAgent::Started { container })?;
                    }
                    return Ok(());
                }
            }
        }
    }

    fn on_ready(&mut self, container: &str, master: Option<OwnedFd>) -> io::Result<()> {
        let Some(running) = self.containers.get_mut(container) else {
            return Ok(());
        };
        if let Err(failure) = launch::constrain(&running.plan, running.pid) {
            return self.on_failed(container, failure);
        }
        running.state = State::Created;
        if let (Some(master), Some(token)) = (master, running.tokens.first().copied()) {
            make_non_blocking(&master)?;
            running.terminal = Some(master.try_clone()?);
            self.offer(token, container, Endpoint::Terminal(master))?;
        }
        console::say(format_args!("{container}: set up"));
        self.send(&FromAgent::Created { container: container.to_owned() })
    }

    fn on_failed(&mut self, container: &str, failure: Failure) -> io::Result<()> {
        let Some(mut running) = self.containers.remove(container) else {
            return Ok(());
        };
        running.channel = None;
        // SAFETY: plain numbers; the process has not been reaped.
        unsafe { libc::kill(running.pid, libc::SIGKILL) };
        self.streams.cancel(&running.tokens);
        self.relays.end_input(container);
        self.failed.push(running);
        console::say(format_args!("{container}: {failure}"));
        self.send(&failed(container, failure))
    }

    /// Collects every child that has ended.
    fn reap(&mut self) -> io::Result<()> {
        while let Ok(Some(_)) = self.signals.read_signal() {}
        loop {
            let mut status = 0;
            // SAFETY: the pointer is to a live int.
            let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
            if pid <= 0 {
                return Ok(());
            }
            self.failed.retain(|running| running.pid != pid);
            let mut containers = self.containers.iter();
            if let Some((container, _)) = containers.find(|(_, running)| running.pid == pid) {
                let container = container.clone();
                self.on_end(container, status)?;
            }
        }
    }

    fn on_end(&mut self, container: String, status: libc::c_int) -> io::Result<()> {
        // What the process said last comes before its end.
        self.read_reports(&container)?;
        let Some(running) = self.containers.remove(&container) else {
            return Ok(());
        };
        let status = exit_status(status);
        self.relays.end_input(&container);
        let message = match running.state {
            State::Creating => {
                let why = format!("the container's first process ended in its set-up ({status:?})");
                self.streams.cancel(&running.tokens);
                failed(&container, Failure::new(FailurePhase::Process, why))
            }
            State::Created | State::Starting | State::Running => {
                let oom_killed = running.cgroup.oom_killed();
                FromAgent::Exited { container: container.clone(), status, oom_killed }
            }
        };
        drop(running);
        console::say(format_args!("{container}: ended ({status:?})"));
        self.send(&message)
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

    fn offer(&mut self, token: StreamToken, container: &str, endpoint: Endpoint) -> io::Result<()> {
        match self.streams.offered(token, container, endpoint) {
            Some(pair) => self.join(pair),
            None => Ok(()),
        }
    }

    fn join(&mut self, Pair { container, endpoint, connection }: Pair) -> io::Result<()> {
        let (poller, relays) = (&self.poller, &mut self.relays);
        match endpoint {
            Endpoint::Output(pipe) => {
                relays.start(poller, Relay::from_pipe(pipe, connection), None)
            }
            Endpoint::Input(pipe) => {
                relays.start(poller, Relay::to_process(connection, pipe), Some(&container))
            }
            Endpoint::Terminal(master) => {
                let input = Relay::to_process(connection.try_clone()?, master.try_clone()?);
                relays.start(poller, Relay::from_terminal(master, connection), None)?;
                relays.start(poller, input, Some(&container))
            }
        }
    }
}

fn failed(container: &str, failure: Failure) -> FromAgent {
    let Failure { phase, message, exit_code } = failure;
    FromAgent::Failed { container: container.to_owned(), phase, message, exit_code }
}
