//! A container's life, from host set-up to teardown.
//!
//! * [`life`]: the phases, one after the other.
//! * [`watch`]: what happens next, and what it means.
//! * [`execs`]: further programs in the container.
//! * [`inspection`]: what the monitor itself answers to later commands, and leaves behind.
//! * [`questions`]: what the agent answers to later commands.
//! * [`members`]: other containers of a pod in this one's machine.
//! * [`membership`]: what differs for a container that is one of those.
//! * [`memory`]: what happens when the container's memory runs out.
//! * [`outcome`]: what the command is told in the end.
//! * [`overrun`]: the limits of time and output, which the monitor keeps.
//! * [`host`]: the container's place on the host, and the way out of it.
//! * [`failure`]: why a container didn't run to its own end.

mod execs;
mod failure;
mod host;
mod inspection;
mod life;
mod members;
mod membership;
mod memory;
mod outcome;
mod overrun;
mod questions;
mod watch;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow};
use kiln_protocol::frame::encode;
use kiln_protocol::{MAX_TO_AGENT, ToAgent, WindowSize};
use kiln_vmm::config::GuestEnd;
use tokio::sync::mpsc;
use tokio::task::LocalSet;

use self::execs::Execs;
use self::failure::Failure;
use self::members::Members;
use self::memory::{OOM_KILLED, Watchers};
use self::overrun::Overrun;
use self::questions::Questions;
use super::agent_stream::AgentStream;
use super::broker::Broker;
use super::budget::Budget;
use super::clock::GuestClock;
use super::control::{self, Asker, Reply};
use super::conversation::{Conversation, Progress};
use super::events::{self, Event, Sources, watched_signals};
use super::machine::{Machine, Role};
use super::phases::{self, Phase, Timeline};
use super::stdio::Tokens;
use super::tail::Tail;
use super::trace::Trace;
use super::transcript::Transcript;
use super::{
    ContainerConfig, Deadlines, FromMonitor, Guest, Mode, MonitorConfig, NamespaceConfig, Occasion,
    Outcome, packet,
};
use crate::bundle::Namespace;
use crate::cgroup::{self, Limits, Origin};
use crate::limits::REACHED;
use crate::mend;
use crate::network::{self, Uplinks};
use crate::place::{self, rootfs::Host};
use crate::state::{Record, StateDir, Status};

/// Messages to the agent that it has not read yet; more mean that it doesn't read.
const UNREAD_MESSAGES: usize = 256;

/// `kiln monitor`: runs a sandbox to its end. Whatever fails is the [`Outcome`] that the command is
/// sent.
///
/// # Safety
/// As for [`InheritedFd::take`](kiln_vmm::config::InheritedFd::take), for every descriptor in
/// `config`.
pub unsafe fn run(config: MonitorConfig) -> ! {
    // SAFETY: the caller's promise; it is taken once.
    let command = Rc::new(unsafe { config.command.take() });
    // SAFETY: the caller's promise, for the rest.
    let exit_code = match unsafe { stand_for_sandbox(config, &command) } {
        Ok(exit_code) => exit_code,
        Err(error) => {
            let error = Some(mend::append(&format!("{error:#}")));
            Outcome { exit_code: 1, error, notice: None }.report(Some(&command));
            1
        }
    };
    // Threads that wait for standard input go with the process.
    std::process::exit(exit_code.into())
}

/// Runs the sandbox to its end; gives the status to exit with.
///
/// # Errors
/// It can't even begin.
///
/// # Safety
/// As for [`InheritedFd::take`](kiln_vmm::config::InheritedFd::take), for every descriptor in
/// `config` but that of the command.
unsafe fn stand_for_sandbox(
    mut config: MonitorConfig,
    command: &Rc<OwnedFd>,
) -> anyhow::Result<u8> {
    // SAFETY: the caller's promise; likewise below, each is taken once.
    let lock = unsafe { config.state.1.take() };
    let descriptors = match &config.guest {
        // SAFETY: as above.
        Guest::Own(guest) => unsafe {
            Descriptors::Machine { kernel: guest.kernel.take(), agent: guest.agent.take() }
        },
        // SAFETY: as above.
        Guest::Pod(pod) => Descriptors::Sandbox(unsafe { pod.monitor.take() }),
    };
    // SAFETY: as above.
    let namespaces = unsafe { take_namespaces(&config.namespaces) };
    // SAFETY: as above.
    let trace = config.trace.map(|file| unsafe { file.take() });
    let trace = match trace {
        Some(file) => Trace::go_on(file.into()).context("--trace")?,
        None => Trace::default(),
    };
    let state = StateDir::inherit(config.state.0.clone(), lock).context("state directory")?;
    place::restraint::of_monitor()?;
    watched_signals(config.mode != Mode::Attached).thread_block()?;
    let origin = Origin::here()?;
    let outside = network::Namespace::here().context("/proc/self/ns/net")?;
    let begun = phases::now();
    // The one moment at which the process has one thread, and nothing that lives in a namespace.
    let placed = take_place(&mut config, &state, namespaces);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let span = tracing::info_span!("sandbox", id = %config.container.id);
    let _entered = span.enter();
    LocalSet::new().block_on(&runtime, async {
        let mut monitor = Monitor::new(config, state, Rc::clone(command), origin, trace)?;
        monitor.timeline.passed("cgroup and namespaces", begun);
        let inside = network::Namespace::here().context("/proc/self/ns/net")?;
        let takes = inside != outside && monitor.guest.takes_interfaces();
        monitor.record.network = takes.then_some(inside);
        let result = match placed {
            Ok(()) => monitor.live(descriptors).await,
            Err(error) => Err(error.into()),
        };
        let mut outcome = monitor.outcome(result).await;
        monitor.clean_up(&mut outcome);
        let exit_code = outcome.exit_code;
        outcome.report(monitor.command.as_deref());
        Ok(exit_code)
    })
}

/// Moves this process to where callers will look for the container. What that makes on the host is
/// written down first, and again once it is known to be the container's own.
fn take_place(
    config: &mut MonitorConfig,
    state: &StateDir,
    namespaces: Vec<Namespace>,
) -> anyhow::Result<()> {
    config.record.monitor = crate::state::Monitor::this().context("/proc/self/stat")?;
    let mut plan = cgroup::Plan::new(&config.cgroup, &config.container.id)?;
    config.record.cgroup = plan.cgroup().clone();
    state.write(&config.record).context("state.json")?;
    let made = plan.make();
    config.record.cgroup = plan.cgroup().clone();
    state.write(&config.record).context("state.json")?;
    made?;
    config.record.cgroup.apply(&config.limits.standing)?;
    config.record.cgroup.enter()?;
    drop(plan);
    if let Some(score) = config.oom_score_adj {
        place::oom::take_score(score)?;
    }
    place::namespaces::enter(namespaces, config.hostname.as_deref())?;
    if config.hostname.is_none()
        && let Some(name) = place::namespaces::hostname_joined(&config.namespaces)?
    {
        config.container.set_hostname(&name).context("config.json")?;
    }
    Ok(())
}

/// Takes the namespaces of a configuration over.
///
/// # Safety
/// As for [`InheritedFd::take`](kiln_vmm::config::InheritedFd::take).
unsafe fn take_namespaces(configs: &[NamespaceConfig]) -> Vec<Namespace> {
    let take = |config: &NamespaceConfig| Namespace {
        kind: config.kind,
        // SAFETY: the caller's promise.
        existing: config.existing.map(|fd| unsafe { fd.take() }),
    };
    configs.iter().map(take).collect()
}

fn second(fd: &OwnedFd) -> std::io::Result<OwnedFd> {
    events::second(fd.as_fd())
}

/// What a monitor starts from.
enum Descriptors {
    /// A machine of its own.
    Machine { kernel: OwnedFd, agent: OwnedFd },
    /// The monitor of the pod's sandbox.
    Sandbox(OwnedFd),
}

/// What happened that concerns the phases.
enum Step {
    Connected(UnixStream),
    Said(Progress),
    StartAsked(Asker),
    HooksRan,
    StreamEnded,
    /// Somebody wants a container to be over that has ended.
    Hurried,
    /// The process on the host that stands for an exec has ended.
    ProxyGone,
    /// The monitor of the pod's sandbox answers.
    PodAnswered(Reply, Vec<OwnedFd>),
    /// It has ended.
    PodGone,
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
    record: Record,
    mode: Mode,
    /// The command that started the sandbox, until it has what it waits for.
    command: Option<Rc<OwnedFd>>,
    limits: Limits,
    /// The cgroups that the monitor was started in.
    origin: Origin,
    /// The interfaces there, from the machine's start on.
    uplinks: Option<Uplinks>,
    /// The mount namespace that it was started in, once it has left that.
    host: Option<Host>,
    guest: Guest,
    deadlines: Deadlines,
    pid_file: Option<PathBuf>,
    timings: Option<PathBuf>,
    state: Option<StateDir>,
    timeline: Timeline,
    sources: Sources,
    events: mpsc::Receiver<Event>,
    machine: Machine,
    broker: Option<Rc<Broker>>,
    tokens: Tokens,
    agent: Option<Agent>,
    execs: Execs,
    questions: Questions,
    watchers: Watchers,
    overrun: Overrun,
    /// The other containers in its machine.
    members: Members,
    /// What a paused container was before.
    before_pause: Status,
    conversation: Conversation,
    clock: GuestClock,
    /// What the container and its execs may write, if that is limited.
    budget: Option<Arc<Budget>>,
    console: Tail,
    errors: Vec<(Role, Tail)>,
    transcript: Transcript,
    new_size: Option<WindowSize>,
    debug: bool,
    /// Output streams that have ended.
    stream_ends: usize,
    /// A container is there to get signals.
    set_up: bool,
    /// The container was sent SIGKILL.
    killed: bool,
    /// The status to exit with, once the container has ended.
    exit_status: Option<u8>,
    /// The guest's kernel has killed processes of the container for want of memory.
    oom_killed: bool,
    /// The guest has been told to end: that things end is expected.
    ending: bool,
    /// The command that is waited for by somebody has ended.
    orphaned: bool,
}

impl Monitor {
    fn new(
        config: MonitorConfig,
        state: StateDir,
        command: Rc<OwnedFd>,
        origin: Origin,
        trace: Trace,
    ) -> anyhow::Result<Self> {
        let (sources, events) = events::open();
        sources.watch_command(second(&command)?)?;
        let leads_session = config.mode != Mode::Attached;
        sources.watch_signals(&watched_signals(leads_session), leads_session)?;
        sources.watch_commands(state.listen(control::NAME).context("control socket")?)?;
        let mut record = config.record;
        for own in [OOM_KILLED, REACHED] {
            record.annotations.remove(own);
        }
        let budget = config.container.step.output.map(Budget::new).transpose();
        let budget = budget.context("output limit")?.map(Arc::new);
        let began = Duration::from_nanos(config.started_ns);
        let timeline = Timeline::begin(began, trace, &config.container.id);
        Ok(Self {
            record,
            limits: config.limits,
            origin,
            uplinks: None,
            host: None,
            mode: config.mode,
            command: Some(command),
            conversation: match &config.guest {
                Guest::Own(_) => Conversation::new(&config.container.id),
                Guest::Pod(_) => Conversation::joined(&config.container.id),
            },
            container: config.container,
            guest: config.guest,
            deadlines: config.deadlines,
            pid_file: config.pid_file,
            timings: config.timings,
            state: Some(state),
            timeline,
            sources,
            events,
            machine: Machine::default(),
            broker: None,
            tokens: Tokens::default(),
            agent: None,
            execs: Execs::default(),
            questions: Questions::default(),
            watchers: Watchers::default(),
            overrun: Overrun::default(),
            members: Members::default(),
            before_pause: Status::Running,
            clock: GuestClock::default(),
            budget,
            console: Tail::default(),
            errors: Vec::new(),
            transcript: Transcript::default(),
            new_size: None,
            debug: config.debug,
            stream_ends: 0,
            set_up: false,
            killed: false,
            exit_status: None,
            oom_killed: false,
            ending: false,
            orphaned: false,
        })
    }

    fn talk_over(&mut self, stream: UnixStream) -> Result<(), Failure> {
        let stream = AgentStream::new(stream).context("the agent's connection")?;
        let writer = stream.clone();
        let (messages, mut queue) = mpsc::channel::<Vec<u8>>(UNREAD_MESSAGES);
        tokio::task::spawn_local(async move {
            while let Some(frame) = queue.recv().await {
                // The reading half reports a connection that has ended.
                if writer.write_all(&frame).await.is_err() {
                    return;
                }
            }
        });
        self.sources.watch_agent(stream);
        self.agent = Some(Agent { messages });
        Ok(())
    }

    fn tell(&self, message: &ToAgent) -> Result<(), Failure> {
        let agent = self.agent.as_ref().context("the guest's agent is not connected")?;
        Ok(agent.send(message)?)
    }

    /// Whether the container is to be deleted by a later command: it is kept, and what a failure
    /// undoes is over; or nobody else is left to run its hooks.
    fn stays(&self) -> bool {
        let orphans_hooks = self.orphaned && !self.record.hooks.poststop.is_empty();
        let is_made = match self.mode {
            Mode::Attached => self.record.status != Status::Creating,
            // Its caller has been told that it is there.
            Mode::Create | Mode::Detached => self.command.is_none(),
        };
        orphans_hooks || self.record.kept && is_made
    }

    /// Writes down how far the container is.
    fn note(&mut self, status: Status) -> Result<(), Failure> {
        self.record.status = status;
        if let Some(state) = &self.state {
            state.write(&self.record).context("state.json")?;
        }
        Ok(())
    }

    /// Has the command run hooks, if there are any.
    fn call_for_hooks(&self, occasion: Occasion) -> bool {
        let hooks = &self.record.hooks;
        let called_for = match occasion {
            Occasion::Made => hooks.has_create(),
            Occasion::Started => !hooks.poststart.is_empty(),
        };
        if let Some(command) = self.command.as_ref().filter(|_| called_for) {
            // One that has gone is an event of its own.
            let _ = packet::send_message(command.as_fd(), &FromMonitor::At(occasion));
        }
        called_for
    }

    /// Tells the command that it has what it waits for.
    fn release_command(&mut self) {
        if let Some(command) = self.command.take() {
            // A command that has gone by now has been told by the pid file and the state.
            let _ = packet::send_message(command.as_fd(), &FromMonitor::Reached);
        }
    }

    /// Ends what still runs and removes what the sandbox has on the host.
    fn clean_up(&mut self, outcome: &mut Outcome) {
        if self.timeline.current() != Phase::Teardown {
            self.timeline.fail();
        }
        let begun = phases::now();
        self.machine.kill(&mut self.timeline.trace);
        self.timeline.passed("end of the machine", begun);
        let begun = phases::now();
        if self.uplinks.as_mut().is_none_or(Uplinks::leave) {
            self.record.network = None;
        }
        self.leave_rootfs();
        if self.stays() {
            self.record.kept = true;
            self.record.end = Some(Box::new(self.last_words(outcome)));
            if let Err(failure) = self.note(Status::Stopped) {
                tracing::warn!("{:#}", failure.error);
            }
        } else if let Some(state) = self.state.take() {
            self.origin.go_back();
            if let Err(error) = state.remove() {
                tracing::warn!(%error, "something of the sandbox stays behind");
            }
        }
        self.timeline.passed("removal from the host", begun);
        self.timeline.end();
        if let Some(path) = &self.timings
            && let Err(error) = self.timeline.write(path)
        {
            let notice = format!("--timings {}: {error}", path.display());
            outcome.notice.get_or_insert(notice);
        }
    }
}
