//! The relays at work, and what each waits for.

use std::collections::HashMap;
use std::io;

use super::poll::{Interest, Poller};
use super::process::ProcessName;
use crate::stream::{Progress, Relay, Side};

/// A relay's number.
pub type RelayId = u64;

/// All relays, by number. The token of a relay's side is `first + 2 * id` for the source, one more
/// for the sink.
#[derive(Debug)]
pub struct Relays {
    first_token: u64,
    next: RelayId,
    all: HashMap<RelayId, Entry>,
}

#[derive(Debug)]
struct Entry {
    relay: Relay,
    /// Whose input it is: it ends with the process. Output ends by itself.
    input_of: Option<ProcessName>,
}

impl Relays {
    /// None yet; tokens from `first_token` upwards belong to relays.
    pub fn new(first_token: u64) -> Self {
        Self { first_token, next: 0, all: HashMap::new() }
    }

    /// Starts a relay.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn start(
        &mut self,
        poller: &Poller,
        relay: Relay,
        input_of: Option<&ProcessName>,
    ) -> io::Result<()> {
        let id = self.next;
        self.next += 1;
        for side in [Side::Source, Side::Sink] {
            poller.add(relay.descriptor(side), self.token(id, side))?;
        }
        self.all.insert(id, Entry { relay, input_of: input_of.cloned() });
        self.advance(poller, id)
    }

    /// Lets the relay go on that a token belongs to, if it is still there.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn on_event(&mut self, poller: &Poller, token: u64) -> io::Result<()> {
        self.advance(poller, (token - self.first_token) / 2)
    }

    /// Drops a process's input.
    pub fn end_input(&mut self, process: &ProcessName) {
        self.all.retain(|_, entry| entry.input_of.as_ref() != Some(process));
    }

    fn advance(&mut self, poller: &Poller, id: RelayId) -> io::Result<()> {
        let Some(entry) = self.all.get_mut(&id) else {
            return Ok(());
        };
        let (side, interest) = match entry.relay.advance() {
            Progress::Wait(Side::Source) => (Side::Source, Interest::Read),
            Progress::Wait(Side::Sink) => (Side::Sink, Interest::Write),
            Progress::Linger => (Side::Sink, Interest::Read),
            // Readiness is told again at once, after the others had their turn.
            Progress::Again => (Side::Source, Interest::Read),
            Progress::Done => {
                self.all.remove(&id);
                return Ok(());
            }
        };
        let descriptor = entry.relay.descriptor(side);
        poller.arm(descriptor, self.first_token + 2 * id + u64::from(side == Side::Sink), interest)
    }

    fn token(&self, id: RelayId, side: Side) -> u64 {
        self.first_token + 2 * id + u64::from(side == Side::Sink)
    }
}
