//! Memory that ran out in the container: counted in its state and in its cgroup on the host, and told to
//! who watches.

use std::time::{Duration, Instant};

use super::Monitor;
use super::failure::Failure;
use crate::sandbox::control::{Asker, Reply};
use crate::sandbox::events::Event;

/// The annotation of the state that has the number of processes killed for want of memory.
pub const OOM_KILLED: &str = "io.kiln.oom-killed";

/// How often the state is written and the host's kernel kills for this: the guest decides how often there
/// is something to write.
const INTERVAL: Duration = Duration::from_secs(1);

/// The most commands that watch at once.
const MAX_WATCHERS: usize = 64;

/// Who is told, and what has been counted.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    commands: Vec<Asker>,
    written: Option<Instant>,
    on_host: OnHost,
    /// It has been said that the host's cgroup can't count.
    told: bool,
}

/// The count of the host's cgroup.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum OnHost {
    /// It has all.
    #[default]
    Counted,
    /// It was changed a moment ago; whether it has to be again.
    Resting { behind: bool },
}

impl Watchers {
    /// A command watches from now on.
    pub(super) fn add(&mut self, command: Asker) {
        self.commands.retain(|command| !command.is_gone());
        if self.commands.len() >= MAX_WATCHERS {
            let why = format!("{MAX_WATCHERS} commands watch the container already");
            return command.answer(&Reply::refusal(why));
        }
        command.answer(&Reply::Done);
        self.commands.push(command);
    }
}

impl Monitor {
    /// So many processes have been killed since the container was created.
    pub(super) fn note_oom_kills(&mut self, kills: u64) -> Result<(), Failure> {
        self.record.annotations.insert(OOM_KILLED.to_owned(), kills.to_string());
        for command in &self.watchers.commands {
            command.answer(&Reply::OomKilled);
        }
        // What is not written now is with the next change of the state.
        if self.watchers.written.is_none_or(|written| written.elapsed() >= INTERVAL) {
            self.watchers.written = Some(Instant::now());
            self.note(self.record.status)?;
        }
        match &mut self.watchers.on_host {
            OnHost::Resting { behind } => *behind = true,
            OnHost::Counted => self.count_on_host(),
        }
        Ok(())
    }

    /// The host's cgroup is to have what it hasn't yet: its last change is a while ago, or the container
    /// has ended, and its callers may look there.
    pub(super) fn count_oom_on_host(&mut self) {
        let behind = self.watchers.on_host == OnHost::Resting { behind: true };
        self.watchers.on_host = OnHost::Counted;
        if behind {
            self.count_on_host();
        }
    }

    /// Has the host's cgroup count one kill, for as many as there were since the last time.
    fn count_on_host(&mut self) {
        self.watchers.on_host = OnHost::Resting { behind: false };
        self.sources.tell_after(INTERVAL, Event::OomUncounted);
        let cgroup = &self.record.cgroup;
        let counted = self.on_host(|| cgroup.count_oom_kill()).flatten();
        if let Err(error) = counted
            && !std::mem::replace(&mut self.watchers.told, true)
        {
            tracing::warn!("the cgroup on the host does not count that memory ran out: {error:#}");
        }
    }

    /// The container has ended, by want of memory. It may be the first that is said of that.
    pub(super) fn note_oom_at_end(&mut self) -> Result<(), Failure> {
        match self.record.annotations.contains_key(OOM_KILLED) {
            true => Ok(()),
            false => self.note_oom_kills(1),
        }
    }
}
