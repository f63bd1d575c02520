//! A container's life, from host set-up to teardown.
//!
//! One task waits for whatever happens next ([`Monitor::next`]), which keeps the deadlines, hears
//! the agent out under the rules of the conversation, and turns everything that ends a sandbox into
//! a [`Failure`]. The phases are written down one after the other in [`Monitor::live`].

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use kiln_protocol::frame::encode;
use kiln_protocol::{
    BindMount, CreateContainer, ExitStatus, MAX_TO_AGENT, ToAgent, VERSION, WindowSize,
};
use kiln_vmm::config::{GuestEnd, VmmEvent};
use kiln_vmm::emulated::qemu;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep_until};

use super::broker::Broker;
use super::conversation::{Conversation, Progress};
use super::events::{self, Event, Sources, forwarded_signals};
use super::machine::{self, Machine, Parts, Role};
use super::phases::{Phase, Timeline};
use super::stdio::{Activity, Streams};
use super::tail::Tail;
use super::{ContainerConfig, Deadlines, FromCommand, GuestConfig, MonitorConfig, Outcome, packet};
use crate::cli::SPEC_VERSION;
use crate::initrd;
use crate::process::{Process, describe};
use crate::state::{State, StateDir, Status};

/// Messages to the agent that it has not read yet; more mean that it doesn't read.
const UNREAD_MESSAGES: usize = 64;
/// How long is waited for the rest of what a process wrote, once it has ended.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// How long is waited for the cause, once the agent's connection is lost.
const CAUSE: Duration = Duration::from_secs(2);
/// How long the guest may keep quiet with an output stream open, once the container has ended.
const DRAIN: Duration = Duration::from_secs(10);

/// `kiln monitor`: runs a sandbox to its end.
///
/// # Errors
/// It can't even begin. Any later failure is the [`Outcome`] that the command is sent.
///
/// # Safety
/// As for [`InheritedFd::take`](kiln_vmm::config::InheritedFd::take), for every descriptor in
/// `config`.
pub unsafe fn run(config: MonitorConfig) -> anyhow::Result<ExitCode> {
    // SAFETY: the caller's promise; likewise below, each is taken once.
    let command = unsafe { config.command.take() };
    // SAFETY: as above.
    let lock = unsafe { config.state.1.take() };
    // SAFETY: as above.
    let kernel = unsafe { config.guest.kernel.take() };
    // SAFETY: as above.
    let agent = unsafe { config.guest.agent.take() };
    let state = StateDir::inherit(config.state.0.clone(), lock);
    forwarded_signals().thread_block()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let span = tracing::info_span!("sandbox", id = %config.container.id);
    let _entered = span.enter();
    let outcome = LocalSet::new().block_on(&runtime, async {
        let mut monitor = Monitor::new(config, state, second(&command)?)?;
        let result = monitor.live(kernel, agent).await;
        let outcome = monitor.outcome(result).await;
        monitor.clean_up();
        anyhow::Ok(outcome)
    })?;
    // The command may be gone: there is nobody to tell then.
    let _ = packet::send_message(command.as_fd(), &outcome);
    // Threads that wait for standard input go with the process.
    std::process::exit(outcome.exit_code.into())
}

fn second(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    events::second(fd.as_fd())
}

/// Why a container didn't run to its own end.
#[derive(Debug)]
struct Failure {
    exit_code: u8,
    error: anyhow::Error,
    /// The guest's console may say more.
    show_console: bool,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit_code: 1, error, show_console: false }
    }
}

impl Failure {
    /// One that the guest's console may explain.
    fn of_guest(error: anyhow::Error) -> Self {
        Self { exit_code: 1, error, show_console: true }
    }

    /// A signal that came before there was a process to pass it on to.
    fn interrupted(signal: i32) -> Self {
        let name = nix::sys::signal::Signal::try_from(signal).map_or("a signal", |s| s.as_str());
        let exit_code = u8::try_from(signal).unwrap_or(0).saturating_add(128);
        let error = anyhow!("interrupted by {name} before the container had started");
        Self { exit_code, error, show_console: false }
    }
}

/// What happened that concerns the phases.
enum Step {
    Connected(UnixStream),
    Said(Progress),
    StreamEnded,
    GuestEnded(GuestEnd),
    DeadlinePassed,
}

/// The connection to the agent.
struct Agent {
    messages: mpsc::Sender<Vec<u8>>,
}

impl Agent {
    fn send(&self, message: &ToAgent) -> anyhow::Result<()> {
        let frame = encode(message, MAX_TO_AGENT).context("message to the guest's agent")?;
        self.messages.try_send(frame).map_err(|_| anyhow!("the guest's agent takes no messages"))
    }
}

struct Monitor {
    container: ContainerConfig,
    guest: GuestConfig,
    deadlines: Deadlines,
    pid_file: Option<std::path::PathBuf>,
    timings: Option<std::path::PathBuf>,
    state: Option<StateDir>,
    timeline: Timeline,
    sources: Sources,
    events: mpsc::Receiver<Event>,
    machine: Machine,
    agent: Option<Agent>,
    conversation: Conversation,
    console: Tail,
    errors: Vec<(Role, Tail)>,
    new_size: Option<WindowSize>,
    debug: bool,
    /// Output streams that have ended.
    stream_ends: usize,
    /// A container is there to get signals.
    running: bool,
    /// The guest has been told to end: that things end is expected.
    ending: bool,
}

impl Monitor {
    fn new(config: MonitorConfig, state: StateDir, command: OwnedFd) -> anyhow::Result<Self> {
        let (sources, events) = events::open();
        sources.watch_command(command)?;
        sources.watch_signals(&forwarded_signals())?;
        Ok(Self {
            conversation: Conversation::new(&config.container.id),
            container: config.container,
            guest: config.guest,
            deadlines: config.deadlines,
            pid_file: config.pid_file,
            timings: config.timings,
            state: Some(state),
            timeline: Timeline::begin(Duration::from_nanos(config.started_ns)),
            sources,
            events,
            machine: Machine::default(),
            agent: None,
            console: Tail::default(),
            errors: Vec::new(),
            new_size: None,
            debug: config.debug,
            stream_ends: 0,
            running: false,
            ending: false,
        })
    }

    /// Runs the container to its end; gives the status to exit with.
    async fn live(&mut self, kernel: OwnedFd, agent: OwnedFd) -> Result<u8, Failure> {
        let broker = self.set_up(kernel, agent)?;
        self.timeline.enter(Phase::Boot);
        self.greet().await?;
        self.timeline.enter(Phase::Create);
        let streams = Streams::new(self.container.terminal);
        let outputs = self.create(&broker, &streams).await?;
        self.timeline.enter(Phase::Start);
        self.start().await?;
        self.timeline.enter(Phase::Run);
        self.announce()?;
        let status = self.run_to_exit().await?;
        self.drain(outputs.saturating_sub(self.stream_ends), &streams.activity).await?;
        self.timeline.enter(Phase::Teardown);
        self.shut_down().await;
        Ok(status)
    }

    fn set_up(&mut self, kernel: OwnedFd, agent: OwnedFd) -> anyhow::Result<Rc<Broker>> {
        let state = self.state.as_ref().context("no state directory")?;
        state.write(&describe_state(&self.container, &self.guest, Status::Creating))?;
        let initrd = initrd::build(&mut agent.into()).context("initial RAM disk")?;
        let debug = [OsString::from("--debug")];
        let parts = Parts {
            container: &self.container,
            guest: &self.guest,
            kernel: kernel.into(),
            initrd,
            state,
            sources: &self.sources,
            options: if self.debug { &debug } else { &[] },
        };
        let (machine, broker) = machine::start(parts)?;
        self.machine = machine;
        let broker = Rc::new(Broker::new(broker)?);
        self.sources.watch_broker(Rc::clone(&broker));
        Ok(broker)
    }

    /// Waits for the agent and answers it.
    async fn greet(&mut self) -> Result<(), Failure> {
        let deadline = self.deadline(self.deadlines.agent);
        loop {
            match self.next(Some(deadline)).await? {
                Step::Connected(stream) => self.talk_over(stream)?,
                Step::Said(Progress::Greeted { version, kernel }) => {
                    tracing::info!(agent = version, kernel, "guest is up");
                    break;
                }
                Step::DeadlinePassed => {
                    let seconds = self.deadlines.agent;
                    return Err(self.too_late("the guest's agent did not answer", seconds));
                }
                Step::GuestEnded(how) => return Err(unasked_end(&how)),
                _ => {}
            }
        }
        self.tell(&welcome()?)
    }

    /// Has the agent set the container up. Gives the number of its output streams.
    async fn create(&mut self, broker: &Broker, streams: &Streams) -> Result<usize, Failure> {
        let create = CreateContainer {
            container: self.container.id.clone(),
            config: self.container.config.clone(),
            binds: self
                .container
                .binds
                .iter()
                .map(|bind| BindMount { mount: bind.index, is_file: bind.is_file })
                .collect(),
            stdio: streams.stdio.clone(),
        };
        self.conversation.creating();
        self.tell(&ToAgent::Create(Box::new(create)))?;
        let outputs =
            streams.connect(broker, &self.sources.sender()).context("standard streams")?;
        let deadline = self.deadline(self.deadlines.create);
        loop {
            match self.next(Some(deadline)).await? {
                Step::Said(Progress::Created) => return Ok(outputs),
                Step::Said(Progress::Failed { message, exit_code, phase }) => {
                    tracing::debug!(?phase, "the agent could not set the container up");
                    return Err(Failure {
                        exit_code,
                        error: anyhow!(message),
                        show_console: false,
                    });
                }
                Step::DeadlinePassed => {
                    let what = "the guest's agent did not set the container up";
                    return Err(self.too_late(what, self.deadlines.create));
                }
                Step::GuestEnded(how) => return Err(unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// Has the agent execute the program.
    async fn start(&mut self) -> Result<(), Failure> {
        self.conversation.starting();
        self.tell(&ToAgent::Start { container: self.container.id.clone() })?;
        let deadline = self.deadline(self.deadlines.create);
        loop {
            match self.next(Some(deadline)).await? {
                Step::Said(Progress::Started) => return Ok(()),
                Step::Said(Progress::Failed { message, exit_code, phase }) => {
                    tracing::debug!(?phase, "the agent could not start the container");
                    return Err(Failure {
                        exit_code,
                        error: anyhow!(message),
                        show_console: false,
                    });
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::DeadlinePassed => {
                    let what = "the guest's agent did not start the container";
                    return Err(self.too_late(what, self.deadlines.create));
                }
                Step::GuestEnded(how) => return Err(unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// Tells the host that the container runs; the pid-file comes last.
    fn announce(&mut self) -> Result<(), Failure> {
        self.running = true;
        if let Some(size) = self.new_size.take() {
            self.tell(&ToAgent::Resize { container: self.container.id.clone(), size })?;
        }
        if let Some(state) = &self.state {
            let running = describe_state(&self.container, &self.guest, Status::Running);
            state.write(&running).context("state.json")?;
        }
        if let Some(path) = &self.pid_file {
            write_pid(path).with_context(|| format!("pid file {}", path.display()))?;
        }
        Ok(())
    }

    /// Waits until the program has ended; gives the status to exit with.
    async fn run_to_exit(&mut self) -> Result<u8, Failure> {
        loop {
            match self.next(None).await? {
                Step::Said(Progress::Exited { status, oom_killed }) => {
                    self.running = false;
                    tracing::info!(?status, oom_killed, "the container has ended");
                    return Ok(match status {
                        ExitStatus::Code(code) => code,
                        ExitStatus::Signal(signal) => 128 + signal,
                    });
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::GuestEnded(how) => return Err(unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// Waits until all that the program wrote has been written on. A guest that keeps a stream open
    /// without a word is not waited for.
    async fn drain(&mut self, mut open: usize, activity: &Activity) -> Result<(), Failure> {
        let mut before = None;
        while open > 0 {
            match self.next(Some(Instant::now() + DRAIN)).await? {
                Step::StreamEnded => open -= 1,
                Step::DeadlinePassed => {
                    let reads = activity.reads();
                    if reads.is_some() && reads == before {
                        tracing::warn!("the guest keeps an output stream open: it is cut off");
                        return Ok(());
                    }
                    before = reads;
                }
                Step::GuestEnded(how) => return Err(unasked_end(&how)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the guest flush and end. One that doesn't is killed.
    async fn shut_down(&mut self) {
        self.ending = true;
        let deadline = self.deadline(self.deadlines.shutdown);
        if self.tell(&ToAgent::Shutdown).is_err() {
            return;
        }
        loop {
            match self.next(Some(deadline)).await {
                Ok(Step::GuestEnded(_)) => return,
                Ok(Step::DeadlinePassed) => {
                    let seconds = self.deadlines.shutdown;
                    tracing::warn!(seconds, "the guest did not end in time and is killed");
                    return;
                }
                Ok(_) => {}
                Err(failure) => {
                    tracing::warn!("{:#}", failure.error);
                    return;
                }
            }
        }
    }

    fn deadline(&self, seconds: u64) -> Instant {
        Instant::now() + Duration::from_secs(seconds)
    }

    fn too_late(&self, what: &str, seconds: u64) -> Failure {
        let phase = self.timeline.current().name();
        Failure::of_guest(anyhow!("{what} within {seconds} s; last phase reached: {phase}"))
    }

    fn talk_over(&mut self, stream: UnixStream) -> Result<(), Failure> {
        let stream = || -> std::io::Result<_> {
            stream.set_nonblocking(true)?;
            tokio::net::UnixStream::from_std(stream)
        }();
        let (reader, mut writer) = stream.context("the agent's connection")?.into_split();
        let (messages, mut queue) = mpsc::channel::<Vec<u8>>(UNREAD_MESSAGES);
        tokio::task::spawn_local(async move {
            while let Some(frame) = queue.recv().await {
                // The reading half reports a connection that has ended.
                if writer.write_all(&frame).await.is_err() {
                    return;
                }
            }
        });
        self.sources.watch_agent(reader);
        self.agent = Some(Agent { messages });
        Ok(())
    }

    fn tell(&self, message: &ToAgent) -> Result<(), Failure> {
        let agent = self.agent.as_ref().context("the guest's agent is not connected")?;
        Ok(agent.send(message)?)
    }

    /// What happens next that concerns the phases; everything else is dealt with on the way.
    async fn next(&mut self, deadline: Option<Instant>) -> Result<Step, Failure> {
        loop {
            let event = match deadline {
                None => self.events.recv().await,
                Some(deadline) => tokio::select! {
                    biased;
                    event = self.events.recv() => event,
                    () = sleep_until(deadline) => return Ok(Step::DeadlinePassed),
                },
            };
            let event = event.context("the event sources have ended")?;
            if let Some(step) = self.handle(event).await? {
                return Ok(step);
            }
        }
    }

    async fn handle(&mut self, event: Event) -> Result<Option<Step>, Failure> {
        match event {
            Event::AgentConnected(stream) => return Ok(Some(Step::Connected(stream))),
            Event::AgentSaid(message) => {
                let heard = self.conversation.hear(message).map_err(anyhow::Error::new);
                return heard.map(|progress| Some(Step::Said(progress))).map_err(Failure::of_guest);
            }
            Event::AgentGone(_) if self.ending => {}
            Event::AgentGone(reason) => return Err(self.explain_loss(reason).await),
            Event::Vmm(_, VmmEvent::Running) => {}
            Event::Vmm(role, VmmEvent::Ended { how }) if role.is_machine() => {
                return Ok(Some(Step::GuestEnded(how)));
            }
            Event::Vmm(_, VmmEvent::Ended { .. }) => {}
            Event::Vmm(role, VmmEvent::Failed { message }) => {
                let error = anyhow!("{}: {}", role.name(), super::tail::printable_lines(&message));
                return Err(Failure::of_guest(error));
            }
            Event::ProcessEnded(role) => return self.process_ended(role).await,
            Event::BrokerFailed(error) if !self.ending => {
                return Err(anyhow!(error).context("connections to the guest").into());
            }
            Event::BrokerFailed(_) => {}
            Event::Output(role, bytes) => self.keep_output(role, &bytes),
            Event::Command(FromCommand::Signal(signal)) | Event::Signal(signal) => {
                self.pass_on(signal)?;
            }
            Event::Command(FromCommand::Resize(size)) if self.running => {
                self.tell(&ToAgent::Resize { container: self.container.id.clone(), size })?;
            }
            Event::Command(FromCommand::Resize(size)) => self.new_size = Some(size),
            Event::CommandGone => {
                return Err(anyhow!("the command that started the sandbox has ended").into());
            }
            Event::StreamEnded => return Ok(Some(Step::StreamEnded)),
        }
        Ok(None)
    }

    /// Sends a signal to the container, or, as long as there is none, ends what is being set up.
    fn pass_on(&mut self, signal: i32) -> Result<(), Failure> {
        const ENDING: [i32; 4] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM];

        if self.running {
            let container = self.container.id.clone();
            return self.tell(&ToAgent::Signal { container, signal, all: false });
        }
        if ENDING.contains(&signal) && self.timeline.current() < Phase::Run {
            return Err(Failure::interrupted(signal));
        }
        Ok(())
    }

    fn keep_output(&mut self, role: Role, bytes: &[u8]) {
        if role == Role::Console {
            self.console.push(bytes);
            return;
        }
        match self.errors.iter_mut().find(|(r, _)| *r == role) {
            Some((_, tail)) => tail.push(bytes),
            None => {
                let mut tail = Tail::default();
                tail.push(bytes);
                self.errors.push((role, tail));
            }
        }
        for line in String::from_utf8_lossy(bytes).lines() {
            tracing::debug!(role = role.name(), "{}", super::tail::printable(line));
        }
    }

    /// What the end of a process means.
    async fn process_ended(&mut self, role: Role) -> Result<Option<Step>, Failure> {
        self.hear_last_words().await;
        let status = self.machine.process(role).map(Process::try_wait);
        let Some(Ok(Some(status))) = status else { return Ok(None) };
        tracing::debug!(role = role.name(), status = describe(status), "process ended");
        let errors = self.errors.iter().find(|(r, _)| *r == role).map(|(_, tail)| tail);
        if role == Role::Qemu {
            let text = errors.map(Tail::text).unwrap_or_default();
            if let Some(how) = qemu::end(status.code(), &text) {
                return Ok(Some(Step::GuestEnded(how)));
            }
        }
        if self.ending {
            return Ok(role.is_machine().then_some(Step::GuestEnded(GuestEnd::Shutdown)));
        }
        let mut message = format!("{} {}", role.name(), describe(status));
        for line in errors.map(Tail::lines).unwrap_or_default() {
            message.push_str("\n  ");
            message.push_str(&line);
        }
        Err(Failure::of_guest(anyhow!(message)))
    }

    /// Takes in what has been written to consoles and standard errors by now.
    async fn hear_last_words(&mut self) {
        let deadline = Instant::now() + LAST_WORDS;
        let mut others = Vec::new();
        while let Ok(Some(event)) =
            tokio::time::timeout(Duration::from_millis(10), self.events.recv()).await
        {
            match event {
                Event::Output(role, bytes) => self.keep_output(role, &bytes),
                other => others.push(other),
            }
            if Instant::now() >= deadline {
                break;
            }
        }
        let sender = self.sources.sender();
        for other in others {
            let sender = sender.clone();
            tokio::task::spawn_local(async move {
                let _ = sender.send(other).await;
            });
        }
    }

    /// The agent's connection is lost: that is rarely the cause.
    async fn explain_loss(&mut self, reason: Option<String>) -> Failure {
        if let Some(reason) = reason {
            return Failure::of_guest(anyhow!("the guest's agent broke the protocol: {reason}"));
        }
        let deadline = Instant::now() + CAUSE;
        loop {
            let step = Box::pin(self.next(Some(deadline))).await;
            match step {
                Err(failure) => return failure,
                Ok(Step::GuestEnded(how)) => return unasked_end(&how),
                Ok(Step::DeadlinePassed) => {
                    return Failure::of_guest(anyhow!("the guest's agent closed its connection"));
                }
                Ok(_) => {}
            }
        }
    }

    /// What the command is told.
    async fn outcome(&mut self, result: Result<u8, Failure>) -> Outcome {
        let failure = match result {
            Ok(exit_code) => return Outcome { exit_code, error: None },
            Err(failure) => failure,
        };
        let mut message = format!("{:#}", failure.error);
        if failure.show_console {
            self.hear_last_words().await;
            let lines = self.console.lines();
            if lines.is_empty() {
                message.push_str("\nthe guest's console is empty");
            } else {
                message.push_str("\nlast lines of the guest's console:");
            }
            for line in lines {
                message.push_str("\n  ");
                message.push_str(&line);
            }
        }
        Outcome { exit_code: failure.exit_code, error: Some(message) }
    }

    /// Ends what still runs and removes what the sandbox has on the host.
    fn clean_up(&mut self) {
        if self.timeline.current() != Phase::Teardown {
            self.timeline.enter(Phase::Teardown);
        }
        self.machine.kill();
        if let Some(state) = self.state.take()
            && let Err(error) = state.remove()
        {
            tracing::warn!(%error, "the state directory stays behind");
        }
        if let Some(path) = &self.timings
            && let Err(error) = self.timeline.write(path)
        {
            tracing::warn!(%error, path = %path.display(), "timings could not be written");
        }
    }
}

fn unasked_end(how: &GuestEnd) -> Failure {
    let how = match how {
        GuestEnd::Shutdown => "it switched itself off".to_owned(),
        GuestEnd::Reset => "it reset itself".to_owned(),
        GuestEnd::TripleFault => "triple fault".to_owned(),
        GuestEnd::Broken { reason, registers } => {
            format!("{reason}\n  {}", registers.join("\n  "))
        }
    };
    Failure::of_guest(anyhow!("the guest has ended by itself: {how}"))
}

fn describe_state(container: &ContainerConfig, guest: &GuestConfig, status: Status) -> State {
    State {
        oci_version: SPEC_VERSION.to_owned(),
        id: container.id.clone(),
        status,
        pid: std::process::id(),
        bundle: container.bundle.clone(),
        engine: guest.engine.name().to_owned(),
    }
}

fn welcome() -> anyhow::Result<ToAgent> {
    use nix::time::{ClockId, clock_gettime};

    let mut entropy = [0; 32];
    // SAFETY: the buffer is that long.
    let filled = unsafe { libc::getrandom(entropy.as_mut_ptr().cast(), entropy.len(), 0) };
    if usize::try_from(filled) != Ok(entropy.len()) {
        return Err(std::io::Error::last_os_error()).context("random bytes for the guest");
    }
    let now = clock_gettime(ClockId::CLOCK_REALTIME).context("wall clock")?;
    let unix_time_ns = now.tv_sec().saturating_mul(1_000_000_000).saturating_add(now.tv_nsec());
    Ok(ToAgent::Welcome { protocol: VERSION, unix_time_ns, entropy })
}

/// Writes this process's id so that a reader sees all of it or nothing.
fn write_pid(path: &std::path::Path) -> std::io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(name);
    std::fs::write(&new, std::process::id().to_string())?;
    std::fs::rename(&new, path)
}
