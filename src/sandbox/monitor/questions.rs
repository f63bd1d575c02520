//! Questions of later commands that the agent answers, and what their answers change.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use kiln_protocol::{Answer, Question, ToAgent};
use oci_spec::runtime::LinuxResources;

use super::Monitor;
use super::failure::Failure;
use crate::cgroup::Limits;
use crate::sandbox::control::{Asker, Processes, Reply, Request};
use crate::sandbox::conversation::Progress;
use crate::sandbox::document;
use crate::sandbox::events::Event;
use crate::sandbox::tail;
use crate::state::Status;

/// The most questions that are not answered at once.
const MAX_QUESTIONS: usize = 64;
/// Of those, the most that are about figures: whoever asks for them again and again leaves room for
/// others, even if the guest answers nothing.
const MAX_FIGURES: usize = MAX_QUESTIONS / 4;

/// What is not answered yet, by number.
#[derive(Debug, Default)]
pub(super) struct Questions {
    next: u32,
    asked: BTreeMap<u32, Asked>,
}

impl Questions {
    fn about_figures(&self) -> usize {
        self.asked.values().filter(|asked| asked.request == Request::Statistics).count()
    }
}

#[derive(Debug)]
struct Asked {
    request: Request,
    /// Who asks, as long as it waits.
    asker: Option<Asker>,
    /// Nobody asks: that there is an answer is all that matters.
    is_sign_of_life: bool,
    /// What else is to change once the guest's limits have.
    change: Option<Change>,
}

#[derive(Debug)]
struct Change {
    /// The host's limits.
    limits: Limits,
    /// The container's memory limit in bytes, if that changes; -1 is none.
    memory: Option<i64>,
}

impl Monitor {
    /// Has the agent answer a request.
    pub(super) fn question(&mut self, request: Request, descriptors: Vec<OwnedFd>, asker: Asker) {
        match self.ask_agent(request, descriptors) {
            Ok((number, change)) => {
                let asker = Some(asker);
                let asked = Asked { request, asker, is_sign_of_life: false, change };
                self.expect_answer(number, asked);
            }
            Err(error) => asker.answer(&Reply::refusal(format!("{error:#}"))),
        }
    }

    fn ask_agent(
        &mut self,
        request: Request,
        descriptors: Vec<OwnedFd>,
    ) -> anyhow::Result<(u32, Option<Change>)> {
        let mut change = None;
        if !self.set_up {
            bail!("container not running");
        }
        if self.questions.asked.len() >= MAX_QUESTIONS {
            bail!("the guest's agent has {MAX_QUESTIONS} questions to answer: try again");
        }
        if request == Request::Statistics && self.questions.about_figures() >= MAX_FIGURES {
            bail!(
                "the guest's agent has not answered {MAX_FIGURES} questions for figures yet: try again"
            );
        }
        let question = match request {
            Request::Pause if self.record.status == Status::Paused => {
                bail!("container not running")
            }
            Request::Pause => Question::Pause,
            Request::Resume if self.record.status != Status::Paused => {
                bail!("container not paused")
            }
            Request::Resume => Question::Resume,
            Request::Processes => Question::Processes,
            Request::Statistics => Question::Statistics,
            Request::Update => {
                let resources = document::read(descriptors).context("limits")?;
                change = Some(self.change(resources.get())?);
                Question::Update { resources }
            }
            other => bail!("{other:?} is no question"),
        };
        Ok((self.put_to_agent(question)?, change))
    }

    /// Asks the agent; gives the question's number.
    fn put_to_agent(&mut self, question: Question) -> anyhow::Result<u32> {
        let number = self.questions.next;
        self.questions.next = number.checked_add(1).context("no numbers are left for questions")?;
        self.conversation.asking(number, &question);
        let container = self.container.id.clone();
        self.tell(&ToAgent::Ask { request: number, container, question })
            .map_err(|failure| failure.error)?;
        Ok(number)
    }

    fn expect_answer(&mut self, number: u32, asked: Asked) {
        self.questions.asked.insert(number, asked);
        let limit = Duration::from_secs(self.deadlines.create);
        self.sources.tell_after(limit, Event::AnswerOverdue(number));
    }

    /// Has the agent show that it is there. Whoever sends a signal that should end the container is
    /// not to wait for ever where nobody hears of it.
    pub(super) fn expect_sign_of_life(&mut self) -> Result<(), Failure> {
        if self.questions.asked.values().any(|asked| asked.is_sign_of_life) {
            return Ok(());
        }
        let number = self.put_to_agent(Question::Processes)?;
        let request = Request::Processes;
        let asked = Asked { request, asker: None, is_sign_of_life: true, change: None };
        self.expect_answer(number, asked);
        Ok(())
    }

    /// What changes of the guest's limits mean for the host's.
    fn change(&self, resources: &str) -> anyhow::Result<Change> {
        let resources: LinuxResources = serde_json::from_str(resources).context("limits")?;
        let memory_mib = self.guest.memory_mib();
        let memory = resources.memory().as_ref().and_then(|memory| memory.limit());
        if let Some(limit) = memory.and_then(|limit| u64::try_from(limit).ok())
            && limit > memory_mib << 20
        {
            bail!(
                "linux.resources.memory.limit: {limit} bytes are more than the guest's memory of \
                 {memory_mib} MiB, which is fixed when it starts"
            );
        }
        let limit = memory.and_then(|limit| u64::try_from(limit).ok());
        let machine = self.guest.on_host(limit.or(self.container.memory_limit));
        Ok(Change { limits: Limits::of(&resources, machine), memory })
    }

    /// What the agent answers; gives anything else back.
    pub(super) fn hear_answer(&mut self, progress: Progress) -> Result<Option<Progress>, Failure> {
        let Progress::Answered { request: number, answer } = progress else {
            return Ok(Some(progress));
        };
        let Some(asked) = self.questions.asked.remove(&number) else { return Ok(None) };
        let document = match answer {
            Answer::Done => Err(self.done(asked.request, asked.change)?),
            Answer::Refused(why) => Err(Reply::refusal(tail::printable_lines(&why))),
            Answer::Processes(guest) => {
                let processes = Processes { host: self.stand_ins(), guest };
                document::write(&processes).map_err(|error| Reply::refusal(error.to_string()))
            }
            Answer::Statistics(figures) => {
                document::write(&figures).map_err(|error| Reply::refusal(error.to_string()))
            }
        };
        match (asked.asker, document) {
            (Some(asker), Ok(document)) => asker.answer_with(&Reply::Document, &[document]),
            (Some(asker), Err(reply)) => asker.answer(&reply),
            (None, _) => {}
        }
        Ok(None)
    }

    /// The guest has done what was asked of it: what that means for the host, and the reply.
    fn done(&mut self, request: Request, change: Option<Change>) -> Result<Reply, Failure> {
        match request {
            Request::Pause => self.paused()?,
            Request::Resume => self.resumed()?,
            _ => {}
        }
        Ok(change.map_or(Reply::Done, |change| self.carry_out(&change)))
    }

    /// The agent has had its time to answer. What it does later is still taken note of.
    ///
    /// # Errors
    /// It was to show that it is there at all.
    pub(super) fn answer_is_overdue(&mut self, number: u32) -> Result<(), Failure> {
        let Some(asked) = self.questions.asked.get_mut(&number) else { return Ok(()) };
        let why = format!("the guest's agent did not answer within {} s", self.deadlines.create);
        if let Some(asker) = asked.asker.take() {
            asker.answer(&Reply::refusal(why));
        } else if asked.is_sign_of_life && self.set_up {
            let why = format!("{why}, after a signal that was to end the container");
            return Err(Failure::of_guest(anyhow!(why)));
        }
        Ok(())
    }

    /// Changes the host's limits after the guest's.
    fn carry_out(&mut self, change: &Change) -> Reply {
        if let Some(memory) = change.memory {
            self.container.memory_limit = u64::try_from(memory).ok();
        }
        let limits = &change.limits;
        match self.limit(&limits.standing).and_then(|()| self.limit(&limits.cpu_time)) {
            Ok(()) => Reply::Done,
            Err(error) => {
                Reply::refusal(format!("the limits hold in the guest, but on the host: {error:#}"))
            }
        }
    }

    fn paused(&mut self) -> Result<(), Failure> {
        if self.set_up && self.record.status != Status::Paused {
            self.before_pause = self.record.status;
            self.note(Status::Paused)?;
        }
        Ok(())
    }

    fn resumed(&mut self) -> Result<(), Failure> {
        if self.set_up && self.record.status == Status::Paused {
            self.note(self.before_pause)?;
        }
        Ok(())
    }

    /// The processes on the host that stand for the container's.
    fn stand_ins(&self) -> Vec<i32> {
        let own = std::process::id().cast_signed();
        std::iter::once(own).chain(self.execs.stand_ins()).collect()
    }
}
