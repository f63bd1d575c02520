//! The pod's other containers: the part of their sandbox's monitor between each one's own monitor and
//! the agent ([`pod`](crate::sandbox::pod)).
//!
//! What a container's monitor says is trusted, but only to be about its container. What the agent says
//! of a container is passed on unseen: that container's monitor checks it as any other does, and a
//! guest that breaks the rules there ends it.
//!
//! * [`process`]: how far such a container is in the guest.
//!
//! Words cross: what a container's monitor has sent may reach the agent after the container's end, and
//! its answer comes later still. So a container that goes is not forgotten before the agent has answered
//! one last question about it. The agent answers in order: after that it has nothing more to say.

mod process;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::{Context, bail};
use kiln_protocol::frame::{Decoder, encode};
use kiln_protocol::{FromAgent, MAX_FROM_AGENT, MAX_TO_AGENT, Question, ToAgent};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;

use self::process::{LAST_QUESTION, Process};
use super::failure::Failure;
use super::{Monitor, UNREAD_MESSAGES};
use crate::sandbox::control::{Asker, Reply};
use crate::sandbox::document;
use crate::sandbox::events::{Event, second};
use crate::sandbox::machine::Role;
use crate::sandbox::pod::{Additions, Attached, Join, MemberId, Membership, PodEvent};

/// The most containers beside the sandbox's own.
const MAX_MEMBERS: usize = 256;

/// The containers beside the sandbox's own.
#[derive(Debug, Default)]
pub(super) struct Members {
    all: BTreeMap<MemberId, Member>,
    /// Those whose files are on their way into the share.
    joining: Vec<String>,
    additions: Additions,
    given: MemberId,
}

#[derive(Debug)]
struct Member {
    container: String,
    /// To its monitor, as long as that takes messages.
    monitor: Option<mpsc::Sender<Vec<u8>>>,
    /// It has asked to go, or has ended.
    leaves: bool,
    process: Process,
    /// What of it is in the share, until that is on its way out.
    attached: Option<Attached>,
    /// Nothing of it is in the share.
    detached: bool,
    /// One of the same id, which is taken in once this one is gone.
    successor: Option<Candidate>,
}

/// A container that asks to be taken in.
#[derive(Debug)]
struct Candidate {
    join: Join,
    /// The mount namespace in which its paths mean something.
    namespace: OwnedFd,
    asker: Asker,
}

impl Member {
    /// Whether nothing of it is left.
    fn is_gone(&self) -> bool {
        self.detached && matches!(self.process, Process::Unknown | Process::Silent)
    }
}

impl Members {
    /// Whether a container of this id is there or about to be.
    fn has(&self, container: &str) -> bool {
        self.joining.iter().any(|joining| joining == container)
            || self.all.values().any(|member| member.container == container)
    }

    /// The one of this id that goes, if no other waits for that.
    fn going(&mut self, container: &str) -> Option<&mut Member> {
        let goes = |member: &&mut Member| member.leaves && member.container == container;
        self.all.values_mut().find(goes).filter(|member| member.successor.is_none())
    }

    fn take_joining(&mut self, container: &str) {
        self.joining.retain(|joining| joining != container);
    }
}

impl Monitor {
    /// A container's monitor asks for it to be taken in.
    pub(super) fn take_in(&mut self, descriptors: Vec<OwnedFd>, asker: Asker) {
        match candidate(descriptors, asker.clone()) {
            Ok(candidate) => self.take_in_candidate(candidate),
            Err(error) => asker.answer(&Reply::refusal(format!("{error:#}"))),
        }
    }

    fn take_in_candidate(&mut self, candidate: Candidate) {
        if let Some(member) = self.members.going(&candidate.join.container) {
            member.successor = Some(candidate);
            return;
        }
        let asker = candidate.asker.clone();
        if let Err(error) = self.prepare_to_join(candidate) {
            asker.answer(&Reply::refusal(format!("{error:#}")));
        }
    }

    fn prepare_to_join(&mut self, candidate: Candidate) -> anyhow::Result<()> {
        let Candidate { join, namespace, asker } = candidate;
        if !self.guest.is_own() {
            bail!("container {} is in a pod's machine itself", self.container.id);
        }
        if !self.set_up {
            bail!("it is not running");
        }
        if join.container == self.container.id || self.members.has(&join.container) {
            bail!("its machine has a container of this id already");
        }
        if self.members.all.len() + self.members.joining.len() >= MAX_MEMBERS {
            bail!("its machine has {MAX_MEMBERS} containers already: more are not possible");
        }
        self.members.joining.push(join.container.clone());
        let (server, additions) = (self.server_of_files()?, self.members.additions.clone());
        let sender = self.sources.sender();
        in_thread(move || {
            let result = additions.attach(server, &namespace, &join);
            // A monitor that listens no more has ended, and the share with it.
            let attached = PodEvent::Attached { join, asker, result };
            let _ = sender.blocking_send(Event::Pod(attached));
        })?;
        Ok(())
    }

    fn server_of_files(&mut self) -> anyhow::Result<OwnedFd> {
        let server = self.machine.process(Role::Fs).context("the machine has no files")?;
        Ok(second(server.pidfd())?)
    }

    /// What happens to the pod's containers.
    pub(super) fn pod_event(&mut self, event: PodEvent) -> Result<(), Failure> {
        match event {
            PodEvent::Attached { join, asker, result } => self.attached(&join, &asker, result),
            PodEvent::Said(id, message) => self.pass_on_to_agent(id, message)?,
            PodEvent::Gone(id) => self.leave(id)?,
            PodEvent::Detached(id) => self.detached(id),
        }
        Ok(())
    }

    fn attached(&mut self, join: &Join, asker: &Asker, result: anyhow::Result<Attached>) {
        self.members.take_joining(&join.container);
        let attached = match result {
            Ok(attached) => attached,
            Err(error) => return asker.answer(&Reply::refusal(format!("{error:#}"))),
        };
        let id = self.members.given;
        // A sandbox that takes a container in every second needs 136 years to come round.
        self.members.given = id.wrapping_add(1);
        let member = Member {
            container: join.container.clone(),
            monitor: None,
            leaves: false,
            process: Process::Unknown,
            attached: Some(attached),
            detached: false,
            successor: None,
        };
        self.members.all.insert(id, member);
        if let Err(error) = self.connect_member(id, asker) {
            asker.answer(&Reply::refusal(format!("{error:#}")));
            self.detach(id);
        }
    }

    fn connect_member(&mut self, id: MemberId, asker: &Asker) -> anyhow::Result<()> {
        let broker = self.broker.as_ref().context("the guest is not connected")?.second()?;
        let member = self.members.all.get_mut(&id).context("no such container")?;
        let attached = member.attached.as_ref().context("its files are not there")?;
        let document = document::write(&Membership {
            memory_mib: self.guest.memory_mib(),
            // The sandbox's own begin with 0.
            first_token: (u64::from(id) + 1) << 32,
            rootfs: attached.rootfs.path(),
            binds: attached.binds.iter().map(|place| place.path()).collect(),
        })?;
        let (ours, theirs) = UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let (reader, mut writer) = tokio::net::UnixStream::from_std(ours)?.into_split();
        let (monitor, mut queue) = mpsc::channel::<Vec<u8>>(UNREAD_MESSAGES);
        tokio::task::spawn_local(async move {
            while let Some(frame) = queue.recv().await {
                // The reading half reports a monitor that has ended.
                if writer.write_all(&frame).await.is_err() {
                    return;
                }
            }
        });
        let sender = self.sources.sender();
        tokio::task::spawn_local(listen(id, reader, sender));
        member.monitor = Some(monitor);
        tracing::info!(container = member.container, "a container of the pod is taken in");
        asker.answer_with(&Reply::Joined, &[document, theirs.into(), broker]);
        Ok(())
    }

    /// Tells the agent what the monitor of a container has for it, if it is about that container.
    fn pass_on_to_agent(&mut self, id: MemberId, message: ToAgent) -> Result<(), Failure> {
        let Some(member) = self.members.all.get_mut(&id) else { return Ok(()) };
        let about = match &message {
            ToAgent::Shutdown => return self.leave(id),
            ToAgent::Create(create) if member.process == Process::Unknown => {
                Some(&create.container)
            }
            // The pod's network is its sandbox's. To one that doesn't wait for it the agent would say
            // that it has failed, though it lives.
            ToAgent::Start { container, network: None }
                if matches!(member.process, Process::Created | Process::Over) =>
            {
                Some(container)
            }
            ToAgent::Signal { container, .. } | ToAgent::Resize { container, .. } => {
                Some(container)
            }
            ToAgent::Ask { container, request, .. } if *request != LAST_QUESTION => Some(container),
            ToAgent::Exec(exec) => Some(&exec.container),
            // So is its clock.
            ToAgent::Create(_)
            | ToAgent::Start { .. }
            | ToAgent::Ask { .. }
            | ToAgent::Welcome { .. }
            | ToAgent::SetClock { .. } => None,
        };
        if member.leaves || about != Some(&member.container) {
            tracing::warn!(container = member.container, "its monitor says what it may not");
            return self.leave(id);
        }
        match message {
            ToAgent::Create(_) => member.process = Process::Creating,
            ToAgent::Start { .. } if member.process == Process::Created => {
                member.process = Process::Started;
            }
            _ => {}
        }
        self.tell(&message)
    }

    /// Passes on what the agent says of a container of the pod's; gives anything else back.
    pub(super) fn hear_of_member(
        &mut self,
        message: FromAgent,
    ) -> Result<Option<FromAgent>, Failure> {
        let about = message.container().unwrap_or_default();
        let found = self
            .members
            .all
            .iter_mut()
            .find(|(_, member)| member.process.is_talked_of() && member.container == about);
        let Some((id, member)) = found else { return Ok(Some(message)) };
        let id = *id;
        member.process = member.process.after(&message);
        if member.process == Process::Silent {
            self.forget(id);
            return Ok(None);
        }
        let frame = encode(&message, MAX_FROM_AGENT).context("message of the guest's agent")?;
        let taken = member.monitor.as_ref().is_none_or(|monitor| monitor.try_send(frame).is_ok());
        // One that goes need not listen.
        if !taken && !member.leaves {
            tracing::warn!(container = member.container, "its monitor takes no messages");
        }
        if !taken || member.leaves {
            self.leave(id)?;
        }
        Ok(None)
    }

    /// A container goes: what is left of it in the guest is ended, and then its files leave the share,
    /// and the agent is heard out.
    fn leave(&mut self, id: MemberId) -> Result<(), Failure> {
        let Some(member) = self.members.all.get_mut(&id) else { return Ok(()) };
        let again = std::mem::replace(&mut member.leaves, true);
        let container = member.container.clone();
        if member.process.lives() {
            if !again {
                let signal = libc::SIGKILL;
                self.tell(&ToAgent::Signal { container, exec: None, signal, all: false })?;
            }
            return Ok(());
        }
        let is_owed = member.process == Process::Over;
        // A guest that is to end answers nothing more.
        if is_owed && !self.ending {
            member.process = Process::Asked;
            let (request, question) = (LAST_QUESTION, Question::Processes);
            self.tell(&ToAgent::Ask { request, container, question })?;
        }
        self.detach(id);
        Ok(())
    }

    fn detach(&mut self, id: MemberId) {
        let Some(member) = self.members.all.get_mut(&id) else { return };
        let Some(attached) = member.attached.take() else { return };
        let (additions, sender) = (self.members.additions.clone(), self.sources.sender());
        let container = member.container.clone();
        let started = self.server_of_files().and_then(|server| {
            in_thread(move || {
                if let Err(error) = additions.detach(server, &attached) {
                    tracing::warn!(container, "its files stay in the share: {error:#}");
                }
                let _ = sender.blocking_send(Event::Pod(PodEvent::Detached(id)));
            })
        });
        if let Err(error) = started {
            tracing::warn!("files of a container stay in the share: {error:#}");
            self.detached(id);
        }
    }

    fn detached(&mut self, id: MemberId) {
        let Some(member) = self.members.all.get_mut(&id) else { return };
        member.detached = true;
        if self.ending {
            // All that its monitor waits for.
            member.monitor = None;
        }
        self.forget(id);
    }

    /// Lets a container go of which nothing is left.
    fn forget(&mut self, id: MemberId) {
        if !self.members.all.get(&id).is_some_and(Member::is_gone) {
            return;
        }
        let member = self.members.all.remove(&id);
        if let Some(successor) = member.and_then(|member| member.successor) {
            self.take_in_candidate(successor);
        }
    }
}

fn candidate(mut descriptors: Vec<OwnedFd>, asker: Asker) -> anyhow::Result<Candidate> {
    let namespace = descriptors.pop().context("no mount namespace came with the request")?;
    let join = serde_json::from_str(document::read(descriptors)?.get())?;
    Ok(Candidate { join, namespace, asker })
}

/// What changes the mount namespace of the thread that does it.
fn in_thread(action: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let thread = std::thread::Builder::new().name("kiln-share".to_owned());
    thread.spawn(action).context("a thread for the pod's share")?;
    Ok(())
}

/// Reports what the monitor of a container sends, and its end.
async fn listen(id: MemberId, mut monitor: OwnedReadHalf, sender: mpsc::Sender<Event>) {
    let mut decoder = Decoder::new(MAX_TO_AGENT);
    let mut buffer = vec![0; 16 << 10];
    while let Ok(length @ 1..) = monitor.read(&mut buffer).await {
        decoder.push(&buffer[..length]);
        loop {
            let event = match decoder.next() {
                Ok(Some(message)) => PodEvent::Said(id, message),
                Ok(None) => break,
                Err(error) => {
                    tracing::warn!(%error, "a container's monitor breaks the protocol");
                    let _ = sender.send(Event::Pod(PodEvent::Gone(id))).await;
                    return;
                }
            };
            if sender.send(Event::Pod(event)).await.is_err() {
                return;
            }
        }
    }
    let _ = sender.send(Event::Pod(PodEvent::Gone(id))).await;
}
