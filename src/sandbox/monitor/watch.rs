//! What happens next: deadlines are kept, the agent is heard out under the rules of the conversation,
//! and whatever ends a sandbox becomes a failure.

use std::future::pending;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, anyhow};
use kiln_protocol::{ToAgent, WindowSize};
use kiln_vmm::config::{GuestEnd, VmmEvent};
use kiln_vmm::emulated::qemu;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::time::{Instant, sleep_until};

use super::failure::Failure;
use super::{Monitor, Step};
use crate::process::{Process, describe};
use crate::sandbox::control::{Asker, Reply, Request};
use crate::sandbox::conversation::Progress;
use crate::sandbox::deadline::Deadline;
use crate::sandbox::events::{Event, ends_programs};
use crate::sandbox::machine::Role;
use crate::sandbox::phases::Phase;
use crate::sandbox::tail::{self, Tail};
use crate::sandbox::{FromCommand, Mode, document};
use crate::state::Status;
use crate::terminal;

/// How long is waited for the rest of what a process wrote, once it has ended.
const LAST_WORDS: Duration = Duration::from_millis(100);
/// How long is waited for the cause, once the agent's connection is lost.
const CAUSE: Duration = Duration::from_secs(2);

/// What can be done about a process that was killed.
const KILLED: &str = "the host's kernel kills where memory is short (see dmesg, and memory.events of \
                      the sandbox's cgroup): give the guest less memory, or its cgroup more";

/// What is said when a process was killed in a cgroup that may have so much memory, in bytes.
fn out_of_memory(limit: Option<u64>) -> String {
    let own = limit.map_or_else(String::new, |bytes| {
        format!(
            " (of which it may have {} MiB: linux.resources.memory.limit and what a machine takes)",
            bytes >> 20
        )
    });
    format!(
        "the host's kernel killed it for want of memory: give the guest less, or more to the cgroup \
         that the container is in{own} and to those above it"
    )
}

impl Monitor {
    /// What happens next that concerns the phases; everything else is dealt with on the way, and the
    /// step's limits are kept.
    pub(super) async fn next(
        &mut self,
        mut deadline: Option<&mut Deadline>,
    ) -> Result<Step, Failure> {
        loop {
            self.enforce()?;
            let due = self.overrun.due();
            let event = tokio::select! {
                biased;
                event = self.events.recv() => event,
                () = passed(&mut deadline) => return Ok(Step::DeadlinePassed),
                () = until(due) => continue,
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
                let Some(message) = self.hear_of_member(message)? else { return Ok(None) };
                let heard = self.conversation.hear(message);
                return self.heard(heard.map_err(breach)?);
            }
            // Of the machine, this container has the connection only.
            Event::AgentGone(_) if self.ending && !self.guest.is_own() => {
                return Ok(Some(Step::GuestEnded(GuestEnd::Shutdown)));
            }
            Event::AgentGone(_) if self.ending => {}
            Event::AgentGone(None) if !self.guest.is_own() => return Err(self.sandbox_ended()),
            Event::AgentGone(reason) => return Err(self.explain_loss(reason).await),
            Event::Vmm(_, VmmEvent::Running) => {}
            Event::Vmm(Role::Fs, VmmEvent::SpaceUsedUp) => self.space_used_up()?,
            Event::Vmm(_, VmmEvent::SpaceUsedUp) => {}
            Event::Vmm(role, VmmEvent::Ended { how }) if role.is_machine() => {
                return Ok(Some(Step::GuestEnded(how)));
            }
            Event::Vmm(_, VmmEvent::Ended { .. }) => {}
            Event::Vmm(role, VmmEvent::Failed { message }) => {
                let message = tail::printable_lines(&message);
                let mut lines = message.lines().map(str::to_owned);
                let error = anyhow!("{}: {}", role.name(), lines.next().unwrap_or_default());
                return Err(Failure::of_guest(error).with_details(lines.collect()));
            }
            Event::ProcessEnded(role) => return self.process_ended(role).await,
            Event::BrokerFailed(error) if !self.ending => {
                return Err(anyhow!(error).context("connections to the guest").into());
            }
            Event::BrokerFailed(_) => {}
            Event::Output(role, bytes) => self.keep_output(role, &bytes),
            Event::Signal(libc::SIGWINCH) => self.new_terminal_size()?,
            Event::Command(FromCommand::Signal(signal)) | Event::Signal(signal) => {
                self.pass_on(signal)?;
                return Ok(self.hurry(signal));
            }
            Event::Command(FromCommand::Resize(size)) => self.resize(size)?,
            Event::Command(FromCommand::Proceed) => return Ok(Some(Step::HooksRan)),
            // Its streams are copied here.
            Event::Command(FromCommand::OutputExceeded) => {}
            Event::CommandGone if self.command.is_none() => {}
            Event::CommandGone => {
                self.orphaned = true;
                return Err(Failure::orphaned());
            }
            Event::Asked { request, descriptors, asker } => {
                return Ok(self.asked(request, descriptors, asker));
            }
            Event::ExecAsked { exec, how, descriptors, asker } => {
                self.execute(exec, how, descriptors, asker);
            }
            Event::ExecTold(exec, message) => self.tell_exec(exec, message)?,
            Event::ExecGone(exec) => {
                self.proxy_gone(exec)?;
                return Ok(Some(Step::ProxyGone));
            }
            Event::Monitor(Ok(Some((reply, descriptors)))) => {
                return Ok(Some(Step::PodAnswered(reply, descriptors)));
            }
            Event::Monitor(Ok(None)) => return Ok(Some(Step::PodGone)),
            Event::Monitor(Err(error)) => {
                return Err(anyhow!(error).context("the monitor of the pod's sandbox").into());
            }
            Event::Pod(event) => self.pod_event(event)?,
            Event::KillOverdue if self.set_up => {
                if !self.guest.is_own() {
                    return Err(self.overdue_in_sandbox());
                }
                let why = "the guest did not end the container after SIGKILL: it is switched off";
                let failure = Failure::of_guest(anyhow!(why)).with_exit_code(128 + 9);
                return Err(failure.with_mend(
                    "its kernel or agent hangs: its console may say why; for a slow host raise \
                     shutdown_deadline in the configuration file",
                ));
            }
            Event::KillOverdue => {}
            Event::OomUncounted => self.count_oom_on_host(),
            Event::OutputExceeded => self.output_exceeded()?,
            Event::ClockWasSet => self.clock_was_set()?,
            Event::AnswerOverdue(number) => self.answer_is_overdue(number)?,
            Event::ExecOverdue(exec) => self.exec_is_overdue(exec),
            Event::StreamEnded => return Ok(Some(Step::StreamEnded)),
        }
        Ok(None)
    }

    /// What the agent says about the container is for the phases; the rest is dealt with.
    fn heard(&mut self, progress: Progress) -> Result<Option<Step>, Failure> {
        let Some(progress) = self.hear_of_exec(progress)? else { return Ok(None) };
        let Some(progress) = self.hear_answer(progress)? else { return Ok(None) };
        if let Progress::OomKilled { kills } = progress {
            self.note_oom_kills(kills)?;
            return Ok(None);
        }
        Ok(Some(Step::Said(progress)))
    }

    /// Does what a later command asks for, or has the phase that waits for it do it.
    fn asked(&mut self, request: Request, descriptors: Vec<OwnedFd>, asker: Asker) -> Option<Step> {
        match request {
            Request::Start if self.waits_for_start() => return Some(Step::StartAsked(asker)),
            Request::Start => {
                let status = match self.record.status {
                    _ if self.exit_status.is_some() => "a container that has stopped".to_owned(),
                    // One is created until its start is done.
                    Status::Created | Status::Running => "an already running container".to_owned(),
                    status => {
                        format!("a container in the {} state: only a created one", status.name())
                    }
                };
                asker.answer(&Reply::refusal(format!("cannot start {status}")));
            }
            Request::Signal { signal, all } => {
                if let Some(step) = self.hurry(signal) {
                    asker.answer(&Reply::Done);
                    return Some(step);
                }
                asker.answer(&self.signal(signal, all));
            }
            Request::Process => self.show_process(&asker),
            Request::Inspect => self.inspect(&asker),
            Request::Watch => self.watchers.add(asker),
            Request::Join => self.take_in(descriptors, asker),
            // It comes as an event of its own.
            Request::Exec(_) => {}
            question => self.question(question, descriptors, asker),
        }
        None
    }

    /// Whether a start is what comes next, and none is under way.
    fn waits_for_start(&self) -> bool {
        self.set_up
            && self.record.status == Status::Created
            && self.timeline.current() == Phase::Wait
    }

    /// Answers with the `process` of the container's configuration.
    fn show_process(&self, asker: &Asker) {
        #[derive(Deserialize)]
        struct Config<'a> {
            #[serde(borrow)]
            process: &'a RawValue,
        }

        let config: Result<Config<'_>, _> = serde_json::from_str(self.container.config.get());
        match config.map_err(io::Error::from).and_then(|config| document::write(&config.process)) {
            Ok(document) => asker.answer_with(&Reply::Document, &[document]),
            Err(error) => asker.answer(&Reply::refusal(error.to_string())),
        }
    }

    fn signal(&mut self, signal: i32, all: bool) -> Reply {
        if !self.set_up {
            return Reply::refusal("container not running");
        }
        match self.send_signal(signal, all) {
            Ok(()) => {
                if signal == libc::SIGKILL {
                    self.expect_end();
                }
                Reply::Done
            }
            Err(failure) => Reply::refusal(format!("{:#}", failure.error)),
        }
    }

    /// A signal that would end the program, once that has ended: what it wrote is still taken in, but
    /// somebody wants it to be over.
    fn hurry(&self, signal: i32) -> Option<Step> {
        let drains = self.exit_status.is_some() && !self.ending;
        let ends = signal == libc::SIGKILL || ends_programs(signal);
        (drains && ends).then_some(Step::Hurried)
    }

    /// A guest that can't be trusted to end a container has a while to do so.
    fn expect_end(&self) {
        self.sources.tell_after(Duration::from_secs(self.deadlines.shutdown), Event::KillOverdue);
    }

    fn resize(&mut self, size: WindowSize) -> Result<(), Failure> {
        if self.set_up {
            return self.tell(&ToAgent::Resize {
                container: self.container.id.clone(),
                exec: None,
                size,
            });
        }
        self.new_size = Some(size);
        Ok(())
    }

    /// The terminal of the monitor's own session has another size.
    fn new_terminal_size(&mut self) -> Result<(), Failure> {
        match terminal::size(std::io::stdin().as_fd()) {
            Some(size) if self.container.terminal.is_some() => self.resize(size),
            _ => Ok(()),
        }
    }

    /// Sends a signal to the container, or, as long as it is being set up, ends it.
    fn pass_on(&mut self, signal: i32) -> Result<(), Failure> {
        let is_early = match self.mode {
            Mode::Create => self.record.status == Status::Creating,
            Mode::Detached | Mode::Attached => self.timeline.current() < Phase::Run,
        };
        if is_early {
            let ends = ends_programs(signal);
            return if ends { Err(Failure::interrupted(signal)) } else { Ok(()) };
        }
        if self.set_up {
            return self.send_signal(signal, false);
        }
        Ok(())
    }

    pub(super) fn send_signal(&mut self, signal: i32, all: bool) -> Result<(), Failure> {
        // Until its program is executed, the container's first process is not one that any other
        // signal would end: the kernel spares a namespace's first process.
        let waits = self.record.status == Status::Created;
        let ends = ends_programs(signal);
        let signal = if waits && ends { libc::SIGKILL } else { signal };
        self.killed |= signal == libc::SIGKILL;
        let container = self.container.id.clone();
        self.tell(&ToAgent::Signal { container, exec: None, signal, all })?;
        if ends { self.expect_sign_of_life() } else { Ok(()) }
    }

    fn keep_output(&mut self, role: Role, bytes: &[u8]) {
        match self.errors.iter_mut().find(|(r, _)| *r == role) {
            _ if role == Role::Console => self.console.push(bytes),
            Some((_, tail)) => tail.push(bytes),
            None => {
                let mut tail = Tail::default();
                tail.push(bytes);
                self.errors.push((role, tail));
            }
        }
        self.transcript.log(role, bytes);
    }

    /// What the end of a process means.
    async fn process_ended(&mut self, role: Role) -> Result<Option<Step>, Failure> {
        self.machine.ended(role);
        if !self.ending {
            self.hear_last_words().await;
        }
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
        if self.ending && role == Role::Fs && !status.success() {
            // The guest would wait for it in vain. What it wrote is on the host already.
            tracing::warn!("{} {} while the guest was ending", role.name(), describe(status));
            return Ok(Some(Step::GuestEnded(GuestEnd::Shutdown)));
        }
        if self.ending {
            return Ok(role.is_machine().then_some(Step::GuestEnded(GuestEnd::Shutdown)));
        }
        let failure = Failure::of_guest(anyhow!("{} {}", role.name(), describe(status)))
            .with_details(errors.map(Tail::lines).unwrap_or_default());
        // Whoever serves the machine ends in peace when that has gone: it has a cause of its own.
        if status.success()
            && !role.is_machine()
            && let Some(cause) = self.hear_cause().await
        {
            return Err(cause);
        }
        Err(match status.signal() {
            Some(libc::SIGKILL) => {
                // All is over, and cgroups are found by the host's paths.
                self.leave_rootfs();
                match self.record.cgroup.oom_kills() {
                    0 => failure.with_mend(KILLED),
                    _ => failure.with_mend(out_of_memory(self.record.cgroup.memory_limit())),
                }
            }
            _ => failure,
        })
    }

    /// Takes in what has been written to consoles and standard errors by now.
    pub(super) async fn hear_last_words(&mut self) {
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
            let reason = tail::printable(&reason);
            return breach(anyhow!("the guest's agent broke the protocol: {reason}"));
        }
        let closed = || {
            Failure::of_guest(anyhow!("the guest's agent closed its connection")).with_mend(
                "its console may say why; give the guest more memory (--memory) if it speaks of that",
            )
        };
        self.hear_cause().await.unwrap_or_else(closed)
    }

    /// The guest takes no streams: its agent may be about to say why.
    pub(super) async fn explain_refusal(&mut self, error: std::io::Error) -> Failure {
        let refused = || Failure::of_guest(anyhow!(error).context("standard streams"));
        self.hear_cause().await.unwrap_or_else(refused)
    }

    /// Waits a while for what explains the failure that shows already.
    async fn hear_cause(&mut self) -> Option<Failure> {
        let mut deadline = Deadline::after(CAUSE);
        loop {
            match Box::pin(self.next(Some(&mut deadline))).await {
                Err(failure) => return Some(failure),
                Ok(Step::Said(Progress::Failed { message, exit_code, phase })) => {
                    return Some(Failure::told(message, exit_code, phase));
                }
                Ok(Step::GuestEnded(how)) => return Some(Failure::unasked_end(&how)),
                Ok(Step::DeadlinePassed) => return None,
                Ok(_) => {}
            }
        }
    }
}

/// An agent that does not keep to the protocol. The host is none the worse for it.
fn breach(error: impl Into<anyhow::Error>) -> Failure {
    Failure::of_guest(error.into()).with_mend(
        "install kiln and its agent together; if they are, the step may have taken its guest over",
    )
}

/// Returns once a limit on time has passed; without one never.
async fn passed(deadline: &mut Option<&mut Deadline>) {
    match deadline {
        Some(deadline) => deadline.passed().await,
        None => pending().await,
    }
}

/// Returns at a moment; without one never.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => pending().await,
    }
}
