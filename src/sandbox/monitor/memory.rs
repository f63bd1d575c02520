//! Memory that ran out in the container: counted in its state, and told to who watches.

use std::time::{Duration, Instant};

use super::Monitor;
use super::failure::Failure;
use crate::sandbox::control::{Asker, Reply};

/// The annotation of the state that has the number of processes killed for want of memory.
pub const OOM_KILLED: &str = "io.kiln.oom-killed";

/// How often the state is written for this: the guest decides how often there is something to write.
const INTERVAL: Duration = Duration::from_secs(1);

/// The most commands that watch at once.
const MAX_WATCHERS: usize = 64;

/// Who is told, and what has been counted.
#[derive(Debug, Default)]
pub(super) struct Watchers {
    commands: Vec<Asker>,
    written: Option<Instant>,
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
        Ok(())
    }

    /// The container has ended, by want of memory. It may be the first that is said of that.
    pub(super) fn note_oom_at_end(&mut self) -> Result<(), Failure> {
        match self.record.annotations.contains_key(OOM_KILLED) {
            true => Ok(()),
            false => self.note_oom_kills(1),
        }
    }
}
