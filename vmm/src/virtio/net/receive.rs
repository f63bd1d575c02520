//! From the tap to the guest.

use std::io;
use std::time::Instant;

use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_queue::{Queue, QueueT};

use super::MAX_FRAME;
use super::features::has;
use super::header::Header;
use super::taken::{Shortage, Taken};
use super::tap::Tap;
use super::wake::{Wait, wait_for_driver};
use crate::GuestMemory;
use crate::config::RateConfig;
use crate::log_limit::LogLimit;
use crate::virtio::rate::Limit;

/// Most frames that are handled in a row.
const BUDGET: usize = 256;

/// What is moved from the tap to the guest.
#[derive(Debug)]
pub(super) struct Receiver {
    /// Where a frame goes, or the end of it, for which too little room was taken from the guest.
    frame: Vec<u8>,
    /// The header and length of the frame that waits there for room.
    held: Option<(Header, usize)>,
    /// How long the next frame will be, probably: room for so much is taken at once.
    expected: usize,
    limit: Limit,
    /// The interface has been removed.
    ended: bool,
    pub(super) passed: u64,
    pub(super) dropped: u64,
    drops: LogLimit,
}

impl Receiver {
    pub(super) fn new(limit: RateConfig) -> Self {
        Self {
            // A byte more than a frame has, so that one that is longer shows.
            frame: vec![0; MAX_FRAME + 1],
            held: None,
            expected: 0,
            limit: limit.into(),
            ended: false,
            passed: 0,
            dropped: 0,
            drops: LogLimit::new(),
        }
    }

    /// Forgets the frame that waits.
    pub(super) fn reset(&mut self) {
        self.held = None;
    }

    /// Moves frames as long as there are both frames and room. Returns whether any were, and what to
    /// wait for.
    ///
    /// # Errors
    /// A queue that is broken.
    pub(super) fn run(
        &mut self,
        tap: &Tap,
        features: u64,
        memory: &GuestMemory,
        queue: &mut Queue,
    ) -> Result<(bool, Wait), String> {
        let mergeable = has(features, VIRTIO_NET_F_MRG_RXBUF);
        let before = self.passed;
        queue.disable_notification(memory).map_err(|e| e.to_string())?;
        for _ in 0..BUDGET {
            let wait = match self.held {
                None if self.ended => Some(Wait::Driver),
                None => self.read(tap, features, memory, queue, mergeable)?,
                Some((header, length)) => self.place(memory, queue, header, length, mergeable)?,
            };
            if let Some(wait) = wait {
                return Ok((self.passed != before, wait));
            }
        }
        // The tap says by itself whether it has more; room for what is held there may be as well.
        let wait = if self.held.is_some() { Wait::Until(Instant::now()) } else { Wait::Tap };
        Ok((self.passed != before, wait))
    }

    /// Reads a frame into the guest's buffers, or for want of enough of them into our own.
    fn read(
        &mut self,
        tap: &Tap,
        features: u64,
        memory: &GuestMemory,
        queue: &mut Queue,
        mergeable: bool,
    ) -> Result<Option<Wait>, String> {
        if let Some(until) = self.limit.wait() {
            return Ok(Some(Wait::Until(until)));
        }
        let mut taken = Taken::default();
        taken.take(memory, queue, self.expected, mergeable)?;
        if taken.is_empty() {
            return wait_for_driver(memory, queue);
        }
        let room = taken.room().min(MAX_FRAME);
        let mut header = Header::default();
        let length = match tap.receive(&mut header, taken.buffers(), &mut self.frame[room..]) {
            Ok(length) => length,
            Err(error) => {
                taken.give_back(queue);
                return Ok(Some(self.cannot_read(&error)));
            }
        };
        self.expected = length.clamp(self.expected - self.expected / 8, MAX_FRAME);
        self.limit.take(length, header.packets(length));
        let checked = header.check_received(features);
        let too_long = if length > MAX_FRAME { Err("a frame longer than any") } else { Ok(()) };
        if let Err(why) = checked.and(too_long) {
            taken.give_back(queue);
            self.drop_frame(why);
        } else if length <= taken.room() {
            taken.finish(memory, queue, header, length)?;
            self.passed += 1;
        } else {
            taken.copy_out(&mut self.frame[..room]);
            taken.give_back(queue);
            self.held = Some((header, length));
        }
        Ok(None)
    }

    /// Gives the guest the frame that is held, if there is room for it.
    fn place(
        &mut self,
        memory: &GuestMemory,
        queue: &mut Queue,
        header: Header,
        length: usize,
        mergeable: bool,
    ) -> Result<Option<Wait>, String> {
        let mut taken = Taken::default();
        match taken.take(memory, queue, length, mergeable)? {
            None => {
                taken.copy_in(&self.frame[..length]);
                taken.finish(memory, queue, header, length)?;
                self.passed += 1;
            }
            Some(Shortage::Queue) => {
                let wait = wait_for_driver(memory, queue)?;
                taken.give_back(queue);
                return Ok(wait);
            }
            Some(Shortage::Buffers) => {
                taken.give_back(queue);
                self.drop_frame("a frame that all buffers together have no room for");
            }
        }
        self.held = None;
        Ok(None)
    }

    fn cannot_read(&mut self, error: &io::Error) -> Wait {
        if error.kind() == io::ErrorKind::WouldBlock {
            return Wait::Tap;
        }
        tracing::warn!("the tap can't be read any more: {error}");
        self.ended = true;
        Wait::Driver
    }

    fn drop_frame(&mut self, why: &str) {
        self.dropped += 1;
        if let Some(count) = self.drops.admit() {
            tracing::debug!(count, "frame for the guest dropped: {why}");
        }
    }
}
