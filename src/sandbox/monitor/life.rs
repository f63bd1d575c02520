//! The phases, one after the other.

use std::ffi::OsString;
use std::io;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use kiln_protocol::{BindMount, CreateContainer, ExitStatus, ToAgent, VERSION};
use kiln_vmm::virtio::fs::Place;
use serde_json::value::to_raw_value;

use super::failure::Failure;
use super::{Descriptors, Monitor, Step};
use crate::bundle::Bind;
use crate::hooks;
use crate::initrd;
use crate::network::Uplinks;
use crate::process::write_pid;
use crate::sandbox::broker::Broker;
use crate::sandbox::control::{Asker, Reply};
use crate::sandbox::conversation::Progress;
use crate::sandbox::deadline::Deadline;
use crate::sandbox::machine::{self, Parts};
use crate::sandbox::phases::{self, Phase};
use crate::sandbox::stdio::{Activity, Drain, Streams};
use crate::sandbox::{Guest, Mode, Occasion};
use crate::state::Status;

/// What can be done about an agent that is slow with a container.
const MORE_TIME: &str = "its console may say what keeps it; for a slow host raise create_deadline in \
                         the configuration file";

impl Monitor {
    /// Runs the container to its end; gives the status to exit with.
    pub(super) async fn live(&mut self, descriptors: Descriptors) -> Result<u8, Failure> {
        self.run_hooks().await?;
        let (broker, files) = match descriptors {
            Descriptors::Machine { kernel, agent } => {
                let broker = self.set_up(kernel, agent)?;
                self.timeline.enter(Phase::Boot);
                self.greet().await?;
                (broker, Files::of_first(&self.container.binds))
            }
            Descriptors::Sandbox(monitor) => self.join_pod(monitor).await?,
        };
        self.timeline.enter(Phase::Create);
        let activity = Arc::new(Activity::limited(self.budget.clone()));
        let outputs = self.create(&broker, files, &activity).await?;
        self.limit(&self.limits.cpu_time)?;
        self.note(Status::Created)?;
        let asked = match self.mode {
            Mode::Create => {
                self.write_pid_file()?;
                self.enter_rootfs();
                self.timeline.enter(Phase::Wait);
                self.release_command();
                Some(self.wait_for_start().await?)
            }
            Mode::Detached | Mode::Attached => None,
        };
        let status = match asked {
            Some(Asked::Over(status)) => status,
            Some(Asked::Start(asker)) => {
                let started = self.start_and_announce().await;
                let reply = self.reply_to_start(&started).await;
                asker.answer(&reply);
                started?;
                self.run_to_exit().await?
            }
            None => {
                self.start_and_announce().await?;
                self.call_for_hooks(Occasion::Started);
                self.write_pid_file()?;
                self.enter_rootfs();
                if self.mode == Mode::Detached {
                    self.release_command();
                }
                self.run_to_exit().await?
            }
        };
        self.drain(outputs.saturating_sub(self.stream_ends), &activity).await?;
        self.drain_execs().await?;
        self.timeline.enter(Phase::Teardown);
        self.shut_down().await;
        Ok(status)
    }

    /// Has the hooks run that come before anything of the container's own. They have limits of
    /// their own.
    async fn run_hooks(&mut self) -> Result<(), Failure> {
        if !self.call_for_hooks(Occasion::Made) {
            return Ok(());
        }
        let begun = phases::now();
        while !matches!(self.next(None).await?, Step::HooksRan) {}
        self.timeline.passed("hooks", begun);
        Ok(())
    }

    fn set_up(&mut self, kernel: OwnedFd, agent: OwnedFd) -> anyhow::Result<Rc<Broker>> {
        let Guest::Own(guest) = &self.guest else { bail!("the container has no machine") };
        let state = self.state.as_ref().context("no state directory")?;
        state.write(&self.record).context("state.json")?;
        let begun = phases::now();
        let initrd = initrd::build(&mut agent.into()).context("initial RAM disk")?;
        self.timeline.passed("initial RAM disk", begun);
        let begun = phases::now();
        let nets = match self.record.network {
            // Whoever creates a container may add an interface before it starts it.
            Some(_) => {
                let least = usize::from(self.mode == Mode::Create);
                let (uplinks, nets) = Uplinks::prepare(least)?;
                self.uplinks = Some(uplinks);
                nets
            }
            None => Vec::new(),
        };
        if self.record.network.is_some() {
            self.timeline.passed("network devices", begun);
        }
        let begun = phases::now();
        let debug = [OsString::from("--debug")];
        let parts = Parts {
            container: &self.container,
            guest,
            kernel: kernel.into(),
            initrd,
            state,
            sources: &self.sources,
            options: if self.debug { &debug } else { &[] },
            nets,
        };
        let (machine, broker) = machine::start(parts)?;
        self.machine = machine;
        self.timeline.passed("start of the machine", begun);
        let broker = Rc::new(Broker::new(broker).context("vsock broker")?);
        self.sources.watch_broker(Rc::clone(&broker));
        self.broker = Some(Rc::clone(&broker));
        Ok(broker)
    }

    /// Waits for the agent and answers it.
    async fn greet(&mut self) -> Result<(), Failure> {
        let mut deadline = deadline(self.deadlines.agent);
        let mut begun = phases::now();
        loop {
            match self.next(Some(&mut deadline)).await? {
                Step::Connected(stream) => {
                    self.timeline.passed("guest's kernel", begun);
                    begun = phases::now();
                    self.talk_over(stream)?;
                }
                Step::Said(Progress::Greeted { version, kernel }) => {
                    self.timeline.passed("agent's greeting", begun);
                    tracing::info!(agent = version, kernel, "guest is up");
                    break;
                }
                Step::DeadlinePassed => {
                    return Err(too_late("answer", self.deadlines.agent).with_mend(
                        "its console may say what keeps the guest; for a slow host raise \
                         agent_deadline in the configuration file",
                    ));
                }
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
        self.sources.watch_clock().context("wall clock")?;
        let unix_time_ns = self.clock.first().context("wall clock")?;
        self.tell(&ToAgent::Welcome { protocol: VERSION, unix_time_ns, entropy: entropy()? })
    }

    /// The host's wall clock was set: the guest's follows.
    pub(super) fn clock_was_set(&mut self) -> Result<(), Failure> {
        let Some(unix_time_ns) = self.clock.anew().context("wall clock")? else { return Ok(()) };
        if self.ending {
            return Ok(());
        }
        tracing::info!("the host's clock has jumped: the guest's is set again");
        self.tell(&ToAgent::SetClock { unix_time_ns })
    }

    /// Has the agent set the container up. Gives the number of its output streams.
    async fn create(
        &mut self,
        broker: &Broker,
        files: Files,
        activity: &Arc<Activity>,
    ) -> Result<usize, Failure> {
        let stdio = self.tokens.stdio(self.container.terminal);
        let state = hooks::state_of(&self.record, Status::Creating, None);
        let create = CreateContainer {
            container: self.container.id.clone(),
            config: self.container.config.clone(),
            state: to_raw_value(&state).context("the container's state")?,
            rootfs: files.rootfs,
            binds: std::iter::zip(&self.container.binds, files.binds)
                .map(|(bind, path)| BindMount { mount: bind.index, path, is_file: bind.is_file })
                .collect(),
            joined: match &self.guest {
                Guest::Own(_) => None,
                Guest::Pod(pod) => Some(pod.joined.clone()),
            },
            stdio: stdio.clone(),
        };
        self.conversation.creating();
        self.tell(&ToAgent::Create(Box::new(create)))?;
        let connected = Streams::connect(broker, &stdio)
            .and_then(|streams| streams.relay(activity, &self.sources.sender()));
        let (outputs, hung_up) = match connected {
            Ok(outputs) => (outputs, None),
            // It is heard out: it may say why, or end, or stay silent.
            Err(error) if is_hang_up(&error) => (0, Some(error)),
            Err(error) => return Err(self.explain_refusal(error).await),
        };
        let mut deadline = deadline(self.deadlines.create);
        loop {
            match self.next(Some(&mut deadline)).await? {
                Step::Said(Progress::Created) => {
                    if let Some(error) = hung_up {
                        return Err(Failure::of_guest(anyhow!(error).context("standard streams")));
                    }
                    self.set_up = true;
                    if let Some(size) = self.new_size.take() {
                        let container = self.container.id.clone();
                        self.tell(&ToAgent::Resize { container, exec: None, size })?;
                    }
                    return Ok(outputs);
                }
                Step::Said(Progress::Failed { message, exit_code, phase }) => {
                    return Err(Failure::told(message, exit_code, phase));
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::DeadlinePassed => {
                    return Err(too_late("set the container up", self.deadlines.create)
                        .with_mend(MORE_TIME));
                }
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// Has the agent execute the program.
    async fn start(&mut self) -> Result<(), Failure> {
        let begun = phases::now();
        let network =
            self.uplinks.as_mut().map(Uplinks::join).transpose().map_err(anyhow::Error::new)?;
        if network.is_some() {
            self.timeline.passed("network", begun);
        }
        self.conversation.starting();
        let container = self.container.id.clone();
        self.tell(&ToAgent::Start { container, network: network.map(Box::new) })?;
        let mut deadline = deadline(self.deadlines.create);
        loop {
            match self.next(Some(&mut deadline)).await? {
                Step::Said(Progress::Started) => return Ok(()),
                // A signal was faster.
                Step::Said(Progress::Exited { status, oom_killed }) => {
                    self.ended(status, oom_killed)?;
                    return Ok(());
                }
                Step::Said(Progress::Failed { message, exit_code, phase }) => {
                    return Err(Failure::told(message, exit_code, phase));
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::DeadlinePassed => {
                    return Err(
                        too_late("start the container", self.deadlines.create).with_mend(MORE_TIME)
                    );
                }
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// Waits until a command asks for the program's start, or the container is over before that.
    async fn wait_for_start(&mut self) -> Result<Asked, Failure> {
        loop {
            match self.next(None).await? {
                Step::StartAsked(asker) => return Ok(Asked::Start(asker)),
                Step::Said(Progress::Exited { status, oom_killed }) => {
                    return Ok(Asked::Over(self.ended(status, oom_killed)?));
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
    }

    async fn start_and_announce(&mut self) -> Result<(), Failure> {
        self.timeline.enter(Phase::Start);
        self.start().await?;
        self.timeline.enter(Phase::Run);
        self.start_clock();
        self.note(Status::Running)
    }

    /// The pid file comes last: who waits for it may rely on everything else.
    fn write_pid_file(&self) -> Result<(), Failure> {
        if let Some(path) = &self.pid_file {
            write_pid(path).with_context(|| format!("pid file {}", path.display()))?;
        }
        Ok(())
    }

    /// Waits until the program has ended; gives the status to exit with.
    async fn run_to_exit(&mut self) -> Result<u8, Failure> {
        loop {
            if let Some(status) = self.exit_status {
                return Ok(status);
            }
            match self.next(None).await? {
                Step::Said(Progress::Exited { status, oom_killed }) => {
                    self.ended(status, oom_killed)?;
                }
                Step::StreamEnded => self.stream_ends += 1,
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
    }

    /// The container has ended; gives the status to exit with.
    fn ended(&mut self, status: ExitStatus, oom_killed: bool) -> Result<u8, Failure> {
        self.set_up = false;
        if oom_killed {
            self.note_oom_at_end()?;
        }
        self.count_oom_on_host();
        tracing::info!(?status, oom_killed, "the container has ended");
        let status = status.in_shell();
        self.exit_status = Some(status);
        self.oom_killed |= oom_killed;
        Ok(status)
    }

    /// Waits until all that the program wrote has been written on. A guest that keeps a stream open
    /// without a word is not waited for, nor for long a caller that doesn't read while somebody wants
    /// the container to be over.
    async fn drain(&mut self, mut open: usize, activity: &Activity) -> Result<(), Failure> {
        let mut drain = Drain::new(activity);
        if self.killed {
            drain.hurry();
        }
        while open > 0 {
            match self.next(Some(drain.deadline())).await? {
                Step::StreamEnded => open -= 1,
                Step::Hurried => drain.hurry(),
                Step::DeadlinePassed if drain.is_stuck() => {
                    tracing::warn!("an output stream is kept open, or not read: it is cut off");
                    return Ok(());
                }
                Step::GuestEnded(how) => return Err(Failure::unasked_end(&how)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Has the guest flush and end. One that doesn't is killed.
    async fn shut_down(&mut self) {
        self.ending = true;
        self.stop_clock();
        let begun = phases::now();
        self.await_end().await;
        self.timeline.passed("end of the guest", begun);
    }

    async fn await_end(&mut self) {
        let mut deadline = deadline(self.deadlines.shutdown);
        if self.tell(&ToAgent::Shutdown).is_err() {
            return;
        }
        loop {
            match self.next(Some(&mut deadline)).await {
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

    async fn reply_to_start(&mut self, started: &Result<(), Failure>) -> Reply {
        match started {
            Ok(()) => Reply::Done,
            Err(failure) => {
                let message = self.explain(failure).await;
                Reply::Failed { message, exit_code: failure.exit_code }
            }
        }
    }
}

pub(super) fn deadline(seconds: u64) -> Deadline {
    Deadline::after(Duration::from_secs(seconds))
}

/// The guest has closed a connection that the host had made.
fn is_hang_up(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset)
}

fn too_late(what: &str, seconds: u64) -> Failure {
    Failure::of_guest(anyhow!("the guest's agent did not {what} within {seconds} s"))
}

/// Where a container's files are in the share.
pub(super) struct Files {
    /// Its root file system.
    pub(super) rootfs: String,
    /// Its bind mounts, in their order.
    pub(super) binds: Vec<String>,
}

impl Files {
    /// Those of the container that the machine was started for.
    fn of_first(binds: &[Bind]) -> Self {
        let place = |bind: &Bind| format!("mounts/{}", bind.index);
        Self { rootfs: Place::Rootfs.path(), binds: binds.iter().map(place).collect() }
    }
}

/// What ends the wait for a start.
enum Asked {
    Start(Asker),
    Over(u8),
}

/// Random bytes for the guest.
fn entropy() -> anyhow::Result<[u8; 32]> {
    let mut entropy = [0; 32];
    // SAFETY: the buffer is that long.
    let filled = unsafe { libc::getrandom(entropy.as_mut_ptr().cast(), entropy.len(), 0) };
    if usize::try_from(filled) != Ok(entropy.len()) {
        return Err(std::io::Error::last_os_error()).context("random bytes for the guest");
    }
    Ok(entropy)
}
