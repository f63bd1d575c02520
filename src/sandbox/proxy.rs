//! The process on the host that stands for a further program in a container, as the monitor stands
//! for the container.
//!
//! It is a descendant of `kiln exec`, and left to the caller's subreaper by a detached one. Its
//! standard streams are the program's (or the slave of a terminal whose master went over
//! `--console-socket`); it exits with the program's status, 128 and the signal's number if a signal
//! ended that, once everything that the program wrote has been written on; signals sent to it are
//! passed on. The program ends with it, whatever ends it, and so does that of a foreground
//! `kiln exec` with the command.
//!
//! It takes nothing from the guest but the bytes that it copies, and gives up what that takes no part in
//! ([`place::restraint`]).

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, anyhow};
use kiln_protocol::WindowSize;
use kiln_vmm::config::InheritedFd;
use nix::sys::signal::SigSet;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use tokio::sync::mpsc::Receiver;
use tokio::task::LocalSet;

use super::budget::Budget;
use super::control::{EXEC_REFUSED, Exec, Reply, Request};
use super::events::{self, Event, ends_programs, second, watched_signals};
use super::stdio::{Activity, Drain, Streams};
use super::{FromCommand, FromMonitor, Outcome, document, packet};
use crate::cgroup::Cgroup;
use crate::mend;
use crate::place;
use crate::process::write_pid;
use crate::state::Monitor;
use crate::terminal;

/// The status of a program that was killed.
const KILLED: u8 = 128 + 9;

/// What a proxy is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProxyConfig {
    /// The container's id.
    pub container: String,
    /// The OCI `process` object.
    pub process: Box<RawValue>,
    /// It has a terminal of this size, which is relayed to standard input and output.
    pub terminal: Option<WindowSize>,
    /// In a paused container too.
    pub ignore_paused: bool,
    /// The sandbox's cgroup, which the proxy joins.
    pub cgroup: Cgroup,
    /// The process that stands for the container, whose namespaces the proxy joins.
    pub container_process: Monitor,
    /// A connection to the monitor's control socket.
    pub monitor: InheritedFd,
    /// A connected `SOCK_SEQPACKET` Unix socket to the command: [`FromCommand`] one way,
    /// [`FromMonitor`] the other.
    pub command: InheritedFd,
    /// The command waits for the program's start only; otherwise for its end.
    pub detached: bool,
    /// Where to write the proxy's pid once the program runs; absolute.
    pub pid_file: Option<PathBuf>,
}

/// `kiln exec-proxy`: stands for a program until that ends.
///
/// # Errors
/// It can't even begin. Any later failure is the [`Outcome`] that the command is sent.
///
/// # Safety
/// As for [`InheritedFd::take`], for every descriptor in `config`.
pub unsafe fn run(config: ProxyConfig) -> anyhow::Result<ExitCode> {
    // SAFETY: the caller's promise; likewise below, each is taken once.
    let command = unsafe { config.command.take() };
    // SAFETY: as above.
    let monitor = unsafe { config.monitor.take() };
    let signals = watched_signals(config.detached);
    signals.thread_block()?;
    join(&config);
    place::restraint::of_proxy(config.pid_file.is_some())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let span = tracing::info_span!("exec", id = %config.container);
    let _entered = span.enter();
    let exit_code = LocalSet::new().block_on(&runtime, async {
        let mut proxy = Proxy::new(config, &signals, command, monitor)?;
        let outcome = match proxy.live().await {
            Ok(exit_code) => Outcome { exit_code, error: None, notice: None },
            Err(failure) => failure,
        };
        let exit_code = outcome.exit_code;
        outcome.report(proxy.command.as_ref());
        anyhow::Ok(exit_code)
    })?;
    // Threads that wait for standard input go with the process.
    std::process::exit(exit_code.into())
}

/// Goes where callers look for what belongs to the container, while the process has one thread.
fn join(config: &ProxyConfig) {
    let joined = config.cgroup.enter();
    let joined = joined.and_then(|()| place::namespaces::join(config.container_process));
    if let Err(error) = joined {
        tracing::warn!("the process that stands for an exec is not where callers look: {error:#}");
    }
}

struct Proxy {
    config: ProxyConfig,
    monitor: OwnedFd,
    /// The command, as long as it waits.
    command: Option<OwnedFd>,
    events: Receiver<Event>,
    sources: events::Sources,
    activity: Arc<Activity>,
    /// What its program's output counts against, if that is limited.
    budget: Option<Arc<Budget>>,
    /// Its program's output was too much.
    exceeded: bool,
    /// Output streams that have not ended.
    outputs: usize,
}

/// What concerns the program's life.
enum Step {
    Replied(Reply, Vec<OwnedFd>),
    MonitorGone,
    CommandGone,
    StreamEnded,
    Signalled(i32),
}

impl Proxy {
    fn new(
        config: ProxyConfig,
        signals: &SigSet,
        command: OwnedFd,
        monitor: OwnedFd,
    ) -> io::Result<Self> {
        let (sources, events) = events::open();
        sources.watch_command(second(&command)?)?;
        sources.watch_signals(signals, config.detached)?;
        sources.watch_monitor(second(&monitor)?)?;
        let (command, activity) = (Some(command), Arc::default());
        let (budget, exceeded, outputs) = (None, false, 0);
        Ok(Self { config, monitor, command, events, sources, activity, budget, exceeded, outputs })
    }

    /// Has the program executed and waits for its end; gives the status to exit with.
    async fn live(&mut self) -> Result<u8, Outcome> {
        self.ask().map_err(failed)?;
        loop {
            match self.next().await? {
                Step::Replied(Reply::Streams { limited }, descriptors) => {
                    let relayed = self.relay(descriptors, limited);
                    self.outputs += relayed.context("standard streams").map_err(failed)?;
                }
                Step::Replied(Reply::Started, _) => self.announce().map_err(failed)?,
                Step::Replied(Reply::Ended(status), _) => {
                    let status = status.in_shell();
                    self.drain(status == KILLED).await?;
                    return self.status(status);
                }
                Step::Replied(Reply::Failed { message, exit_code }, _) => {
                    return Err(Outcome { exit_code, error: Some(message), notice: None });
                }
                Step::Replied(reply, _) => {
                    return Err(failed(anyhow!("the monitor answers with {reply:?}")));
                }
                // Nothing of the guest has outlived it, or is to.
                Step::MonitorGone | Step::CommandGone => return self.status(KILLED),
                Step::StreamEnded => self.outputs = self.outputs.saturating_sub(1),
                Step::Signalled(_) => {}
            }
        }
    }

    /// The status to exit with, unless the container's output limit has ended the program.
    fn status(&self, status: u8) -> Result<u8, Outcome> {
        match &self.budget {
            Some(budget) if self.exceeded || status == KILLED && budget.is_exceeded() => {
                Err(Outcome { exit_code: KILLED, error: Some(budget.reason()), notice: None })
            }
            _ => Ok(status),
        }
    }

    /// Begins to copy the program's streams. Gives the number of those out of the guest.
    fn relay(&mut self, mut descriptors: Vec<OwnedFd>, limited: bool) -> io::Result<usize> {
        if limited {
            let shared = descriptors.pop().ok_or(io::ErrorKind::InvalidData)?;
            self.budget = Some(Arc::new(Budget::join(shared)?));
            self.activity = Arc::new(Activity::limited(self.budget.clone()));
        }
        Streams::from_descriptors(descriptors)?.relay(&self.activity, &self.sources.sender())
    }

    fn ask(&self) -> anyhow::Result<()> {
        let process = document::write(&self.config.process).context("process")?;
        let request = Request::Exec(Exec {
            proxy: std::process::id().cast_signed(),
            terminal: self.config.terminal,
            ignore_paused: self.config.ignore_paused,
        });
        packet::send_with(self.monitor.as_fd(), &request, &[process])
            .context("the sandbox's monitor")
    }

    /// The program runs: the pid file comes last, but for the command's return.
    fn announce(&mut self) -> anyhow::Result<()> {
        if let Some(path) = &self.config.pid_file {
            write_pid(path).with_context(|| format!("pid file {}", path.display()))?;
        }
        if self.config.detached
            && let Some(command) = self.command.take()
        {
            // A command that has gone by now has been told by the pid file.
            let _ = packet::send_message(command.as_fd(), &FromMonitor::Reached);
        }
        Ok(())
    }

    /// Waits until all that the program wrote has been written on; not for long if it was killed, or
    /// a signal comes that would have ended it.
    async fn drain(&mut self, killed: bool) -> Result<(), Outcome> {
        let activity = Arc::clone(&self.activity);
        let mut drain = Drain::new(&activity);
        if killed {
            drain.hurry();
        }
        while self.outputs > 0 {
            let step = tokio::select! {
                biased;
                step = self.next() => Some(step?),
                () = drain.deadline().passed() => None,
            };
            match step {
                Some(Step::StreamEnded) => self.outputs -= 1,
                Some(Step::CommandGone) => return Ok(()),
                // What has come out of the guest is still to be read.
                Some(Step::Replied(..) | Step::MonitorGone) => {}
                Some(Step::Signalled(signal)) if ends_programs(signal) => drain.hurry(),
                Some(Step::Signalled(_)) => {}
                None if drain.is_stuck() => {
                    tracing::debug!("an output stream is kept open, or not read: it is cut off");
                    return Ok(());
                }
                None => {}
            }
        }
        Ok(())
    }

    /// What happens next that concerns the program's life; everything else is passed on.
    async fn next(&mut self) -> Result<Step, Outcome> {
        loop {
            let event = self.events.recv().await;
            match event.context("the event sources have ended").map_err(failed)? {
                Event::Monitor(Ok(Some((reply, streams)))) => {
                    return Ok(Step::Replied(reply, streams));
                }
                Event::Monitor(Ok(None)) => return Ok(Step::MonitorGone),
                Event::Monitor(Err(error)) => {
                    return Err(failed(anyhow!(error).context("the sandbox's monitor")));
                }
                Event::CommandGone if self.command.is_some() => return Ok(Step::CommandGone),
                Event::StreamEnded => return Ok(Step::StreamEnded),
                Event::OutputExceeded => {
                    self.exceeded = true;
                    self.pass_on(FromCommand::OutputExceeded);
                }
                Event::Signal(libc::SIGWINCH) => {
                    if let Some(size) = terminal::size(io::stdin().as_fd()) {
                        self.pass_on(FromCommand::Resize(size));
                    }
                }
                Event::Command(FromCommand::Signal(signal)) | Event::Signal(signal) => {
                    self.pass_on(FromCommand::Signal(signal));
                    return Ok(Step::Signalled(signal));
                }
                Event::Command(message) => self.pass_on(message),
                _ => {}
            }
        }
    }

    fn pass_on(&self, message: FromCommand) {
        if matches!(message, FromCommand::Resize(_)) && self.config.terminal.is_none() {
            return;
        }
        // A monitor that has ended shows by its connection.
        let _ = packet::send_with(self.monitor.as_fd(), &message, &[]);
    }
}

fn failed(error: anyhow::Error) -> Outcome {
    Outcome {
        exit_code: EXEC_REFUSED,
        error: Some(mend::append(&format!("{error:#}"))),
        notice: None,
    }
}
