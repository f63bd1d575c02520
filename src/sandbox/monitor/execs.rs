//! Further programs in the container: the monitor's part between the process on the host that stands
//! for one (the [proxy](crate::sandbox::proxy)) and the agent.
//!
//! The proxy's connection and the guest's process end each other: a proxy that goes has the process
//! killed, the process's end is the last that the proxy is told. The streams are the proxy's own;
//! the monitor only connects them. An exec is forgotten once both are over.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, bail};
use kiln_protocol::{ExecId, ExecProcess, ToAgent};
use kiln_vmm::virtio::vsock::MAX_CONNECTIONS;
use serde_json::json;

use super::failure::Failure;
use super::{Monitor, Step};
use crate::sandbox::control::{self, Asker, EXEC_REFUSED, Reply};
use crate::sandbox::conversation::Progress;
use crate::sandbox::deadline::Deadline;
use crate::sandbox::events::Event;
use crate::sandbox::stdio::{QUIET, Streams};
use crate::sandbox::trace::{Trace, Track};
use crate::sandbox::{FromCommand, document, phases};
use crate::state::Status;

/// The most execs at once: as many as the guest's connections suffice for, three each beside the
/// container's own.
const MAX_EXECS: usize = (MAX_CONNECTIONS - 4) / 3;

/// The row of the first exec in a trace: above any process id (`PID_MAX_LIMIT` of
/// `include/linux/threads.h`), which others are numbered by.
const FIRST_ROW: u64 = 1 << 22;

/// Execs that are not forgotten.
#[derive(Debug, Default)]
pub(super) struct Execs {
    all: BTreeMap<ExecId, Exec>,
}

#[derive(Debug)]
struct Exec {
    /// The proxy's connection, as long as the proxy lives.
    proxy: Option<Asker>,
    /// The proxy's process id.
    stand_in: i32,
    process: Process,
    /// When it was asked for.
    asked: Duration,
    /// When its program ran.
    started: Option<Duration>,
}

/// How far the guest's process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Starting,
    Running,
    Over,
}

impl Execs {
    /// Forgets what is over on both sides.
    fn forget(&mut self, id: ExecId) {
        let over = |exec: &Exec| exec.proxy.is_none() && exec.process == Process::Over;
        if self.all.get(&id).is_some_and(over) {
            self.all.remove(&id);
        }
    }

    /// The processes on the host that stand for execs.
    pub(super) fn stand_ins(&self) -> impl Iterator<Item = i32> {
        self.all.values().filter(|exec| exec.proxy.is_some()).map(|exec| exec.stand_in)
    }
}

impl Exec {
    /// Traces its life on a row of its own.
    fn trace(&self, id: ExecId, trace: &mut Trace) {
        let track = Track { process: std::process::id(), row: FIRST_ROW + u64::from(id.0) };
        trace.name_row(track, &format!("exec {}", id.0));
        let ended = phases::now();
        let more = json!({"stand-in": self.stand_in});
        trace.span(track, "exec", self.asked, ended, more);
        let started = self.started.unwrap_or(ended);
        trace.span(track, "start of the program", self.asked, started, json!({}));
        if self.started.is_some() {
            trace.span(track, "program", started, ended, json!({}));
        }
    }
}

impl Monitor {
    /// Has the agent execute a further program.
    pub(super) fn execute(
        &mut self,
        id: ExecId,
        how: control::Exec,
        descriptors: Vec<OwnedFd>,
        proxy: Asker,
    ) {
        let refuse = |error: anyhow::Error| {
            proxy.answer(&Reply::Failed { message: format!("{error:#}"), exit_code: EXEC_REFUSED });
        };
        let message = match self.prepare_exec(id, how, descriptors) {
            Ok(message) => message,
            Err(error) => return refuse(error),
        };
        let stdio = message.stdio.clone();
        if let Err(failure) = self.tell(&ToAgent::Exec(Box::new(message))) {
            return refuse(failure.error);
        }
        self.conversation.executing(id);
        let connected = self.broker.as_ref().context("the guest is not connected");
        let streams = connected.and_then(|broker| {
            let budget = self.budget.as_ref().map(|budget| budget.share()).transpose()?;
            Ok((Streams::connect(broker, &stdio)?, budget))
        });
        let limited = self.budget.is_some();
        let proxy = match streams.context("standard streams") {
            Ok((streams, budget)) => {
                let mut descriptors = streams.into_descriptors();
                descriptors.extend(budget);
                proxy.answer_with(&Reply::Streams { limited }, &descriptors);
                Some(proxy)
            }
            // What the agent begins with no streams is ended as if its proxy had gone.
            Err(error) => {
                refuse(error);
                None
            }
        };
        let (asked, started) = (phases::now(), None);
        let exec = Exec { proxy, stand_in: how.proxy, process: Process::Starting, asked, started };
        self.execs.all.insert(id, exec);
        self.expect_exec(id);
    }

    fn expect_exec(&self, id: ExecId) {
        let limit = Duration::from_secs(self.deadlines.create);
        self.sources.tell_after(limit, Event::ExecOverdue(id));
    }

    /// The agent has had its time to execute a program. If it does so later, that is ended as if its
    /// proxy had gone.
    pub(super) fn exec_is_overdue(&mut self, id: ExecId) {
        let starting = |exec: &&mut Exec| exec.process == Process::Starting;
        let Some(exec) = self.execs.all.get_mut(&id).filter(starting) else { return };
        if self.record.status == Status::Paused {
            // It begins when the container goes on.
            return self.expect_exec(id);
        }
        if let Some(proxy) = exec.proxy.take() {
            let seconds = self.deadlines.create;
            let message = format!("the guest's agent did not execute it within {seconds} s");
            proxy.answer(&Reply::Failed { message, exit_code: EXEC_REFUSED });
        }
    }

    fn prepare_exec(
        &mut self,
        id: ExecId,
        how: control::Exec,
        descriptors: Vec<OwnedFd>,
    ) -> anyhow::Result<ExecProcess> {
        match self.record.status {
            Status::Created | Status::Running if self.set_up => {}
            Status::Paused if self.set_up && how.ignore_paused => {}
            Status::Paused if self.set_up => {
                bail!("cannot exec in a paused container (use --ignore-paused to override)")
            }
            Status::Creating => bail!("cannot exec in a container that is not created yet"),
            Status::Created | Status::Running | Status::Paused | Status::Stopped => {
                bail!("cannot exec in a stopped container")
            }
        }
        if self.execs.all.len() >= MAX_EXECS {
            bail!(
                "{MAX_EXECS} processes beside the container's own are the most: wait for one to end"
            );
        }
        Ok(ExecProcess {
            container: self.container.id.clone(),
            exec: id,
            process: document::read(descriptors).context("process")?,
            stdio: self.tokens.stdio(how.terminal),
        })
    }

    /// What the agent says about an exec; gives anything else back.
    pub(super) fn hear_of_exec(&mut self, progress: Progress) -> Result<Option<Progress>, Failure> {
        let (id, process, reply) = match progress {
            Progress::ExecStarted(exec) => (exec, Process::Running, Reply::Started),
            Progress::ExecFailed { exec, message, exit_code } => {
                // Not found or not executable, as a shell says it; else as runc does.
                let exit_code =
                    if matches!(exit_code, 126 | 127) { exit_code } else { EXEC_REFUSED };
                (exec, Process::Over, Reply::Failed { message, exit_code })
            }
            Progress::ExecExited { exec, status } => (exec, Process::Over, Reply::Ended(status)),
            other => return Ok(Some(other)),
        };
        let Some(exec) = self.execs.all.get_mut(&id) else { return Ok(None) };
        exec.process = process;
        match process {
            Process::Over => exec.trace(id, &mut self.timeline.trace),
            Process::Starting | Process::Running => exec.started = Some(phases::now()),
        }
        match &exec.proxy {
            Some(proxy) => proxy.answer(&reply),
            None if process == Process::Running => self.kill_exec(id)?,
            None => self.execs.forget(id),
        }
        Ok(None)
    }

    /// What a proxy has for its process.
    pub(super) fn tell_exec(&mut self, id: ExecId, message: FromCommand) -> Result<(), Failure> {
        if message == FromCommand::OutputExceeded {
            return self.output_exceeded();
        }
        let over = |exec: &Exec| exec.process == Process::Over;
        if self.execs.all.get(&id).is_none_or(over) {
            return Ok(());
        }
        let (container, exec) = (self.container.id.clone(), Some(id));
        match message {
            FromCommand::Signal(signal) if (1..=64).contains(&signal) => {
                self.tell(&ToAgent::Signal { container, exec, signal, all: false })
            }
            FromCommand::Signal(_) | FromCommand::Proceed | FromCommand::OutputExceeded => Ok(()),
            FromCommand::Resize(size) => self.tell(&ToAgent::Resize { container, exec, size }),
        }
    }

    /// A proxy has ended, and its process with it.
    pub(super) fn proxy_gone(&mut self, id: ExecId) -> Result<(), Failure> {
        let Some(exec) = self.execs.all.get_mut(&id) else { return Ok(()) };
        exec.proxy = None;
        match exec.process {
            // Killed once it is there: before, it may not be able to hear.
            Process::Starting => {}
            Process::Running => self.kill_exec(id)?,
            Process::Over => self.execs.forget(id),
        }
        Ok(())
    }

    fn kill_exec(&self, id: ExecId) -> Result<(), Failure> {
        self.tell(&ToAgent::Signal {
            container: self.container.id.clone(),
            exec: Some(id),
            signal: libc::SIGKILL,
            all: false,
        })
    }

    /// Waits until the proxies have taken in what their processes wrote, which ended with the
    /// container: the guest's end would cut it off.
    pub(super) async fn drain_execs(&mut self) -> Result<(), Failure> {
        let mut deadline = Deadline::after(QUIET);
        while self.execs.stand_ins().next().is_some() {
            match self.next(Some(&mut deadline)).await? {
                Step::DeadlinePassed => {
                    tracing::warn!("output of processes beside the container's own is cut off");
                    return Ok(());
                }
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
        Ok(())
    }
}
