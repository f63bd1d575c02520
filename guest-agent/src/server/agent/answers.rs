//! Questions about a container.

use std::io;

use kiln_protocol::{Answer, FromAgent, MAX_MESSAGE, MAX_PROCESSES, Question};

use super::{Agent, FIRST_CHANNEL};
use crate::failure::clip;
use crate::process::listing;
use crate::server::container::Container;
use crate::server::process::State;

impl Agent {
    pub(super) fn ask(
        &mut self,
        request: u32,
        container: &str,
        question: &Question,
    ) -> io::Result<()> {
        let cpus = self.environment.cpus;
        let answer = match self.living(container) {
            None => Err(format!("container {container:?} does not run")),
            Some(asked) if asked.first.state == State::Creating => {
                Err(format!("container {container:?} is not set up yet"))
            }
            Some(asked) => match question {
                Question::Pause => return self.pause(request, container),
                Question::Resume => return self.resume(request, container),
                Question::Processes => processes(asked),
                Question::Statistics => Ok(Answer::Statistics(Box::new(asked.cgroup.statistics()))),
                Question::Update { resources } => update(asked, resources.get(), cpus),
            },
        };
        self.answer(container, request, answer)
    }

    /// Answers once all processes stand still, see [`Agent::on_cgroup_event`].
    fn pause(&mut self, request: u32, container: &str) -> io::Result<()> {
        let Some(asked) = self.containers.get_mut(container) else { return Ok(()) };
        if let Err(error) = asked.cgroup.freeze(true) {
            return self.answer(
                container,
                request,
                Err(format!("freeze the container's cgroup: {error}")),
            );
        }
        asked.pausing.push(request);
        self.on_cgroup_event(container)
    }

    fn resume(&mut self, request: u32, container: &str) -> io::Result<()> {
        let Some(asked) = self.containers.get_mut(container) else { return Ok(()) };
        let pausing = std::mem::take(&mut asked.pausing);
        let thawed = asked.cgroup.freeze(false);
        for paused in pausing {
            self.answer(container, paused, Err("the container was resumed".to_owned()))?;
        }
        let thawed = thawed.map(|()| Answer::Done);
        self.answer(
            container,
            request,
            thawed.map_err(|error| format!("thaw the container's cgroup: {error}")),
        )
    }

    /// Something has happened to a container's cgroup, by the number of its first process.
    pub(super) fn on_cgroup_token(&mut self, unique: u64) -> io::Result<()> {
        match self.find(|process| process.channel_token == FIRST_CHANNEL + unique) {
            Some(name) => self.on_cgroup_event(&name.container),
            None => Ok(()),
        }
    }

    /// As [`Self::on_cgroup_token`], of its memory.
    pub(super) fn on_memory_token(&mut self, unique: u64) -> io::Result<()> {
        match self.find(|process| process.channel_token == FIRST_CHANNEL + unique) {
            Some(name) => self.on_memory_event(&name.container),
            None => Ok(()),
        }
    }

    /// Looks at whether a container that is to end has no processes any more, and whether one that is to
    /// pause stands still by now.
    fn on_cgroup_event(&mut self, container: &str) -> io::Result<()> {
        self.end_if_over(container)?;
        let Some(asked) = self.containers.get_mut(container) else { return Ok(()) };
        if asked.events.read("frozen") == 0 {
            return Ok(());
        }
        for request in std::mem::take(&mut asked.pausing) {
            self.answer(container, request, Ok(Answer::Done))?;
        }
        Ok(())
    }

    /// Reports processes that have been killed for want of memory, once the host knows of the
    /// container.
    pub(super) fn on_memory_event(&mut self, name: &str) -> io::Result<()> {
        let Some(container) = self.containers.get_mut(name) else { return Ok(()) };
        let kills = container.memory_events.as_ref().map_or(0, |events| events.read("oom_kill"));
        let known = container.first.state != State::Creating && container.first.failure.is_none();
        if !known || kills <= container.oom_kills {
            return Ok(());
        }
        container.oom_kills = kills;
        let container = name.to_owned();
        self.send(&FromAgent::OomKilled { container, kills })
    }

    /// Sends an answer; an error is a refusal.
    pub(super) fn answer(
        &mut self,
        container: &str,
        request: u32,
        answer: Result<Answer, String>,
    ) -> io::Result<()> {
        let refused = |why: String| Answer::Refused(clip(&why, MAX_MESSAGE).to_owned());
        let answer = answer.unwrap_or_else(refused);
        let container = container.to_owned();
        self.send(&FromAgent::Answer { container, request, answer })
    }
}

fn processes(container: &Container) -> Result<Answer, String> {
    let all = container.cgroup.processes().map_err(|error| format!("list processes: {error}"))?;
    // One that ends meanwhile is none any more.
    let described = all.into_iter().filter_map(listing::describe).take(MAX_PROCESSES);
    Ok(Answer::Processes(described.collect()))
}

fn update(container: &Container, resources: &str, cpus: usize) -> Result<Answer, String> {
    let resources =
        serde_json::from_str(resources).map_err(|error| format!("linux.resources: {error}"))?;
    match container.cgroup.update(&resources, cpus) {
        Ok(()) => Ok(Answer::Done),
        Err(failure) => Err(failure.message),
    }
}
