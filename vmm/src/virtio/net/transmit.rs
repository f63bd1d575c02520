//! From the guest to the tap.

use std::io;
use std::time::Instant;

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::header::{self, Header};
use super::tap::Tap;
use super::wake::{Wait, wait_for_driver};
use crate::GuestMemory;
use crate::config::RateConfig;
use crate::log_limit::LogLimit;
use crate::virtio::buffers::{Buffers, Bytes, MAX_PIECES};
use crate::virtio::rate::Limit;

/// Most frames that are handled in a row.
const BUDGET: usize = 256;

/// What is moved from the guest to the tap.
#[derive(Debug)]
pub(super) struct Transmitter {
    limit: Limit,
    pub(super) passed: u64,
    pub(super) dropped: u64,
    drops: LogLimit,
}

/// The tap takes no frame now.
struct Full;

impl Transmitter {
    pub(super) fn new(limit: RateConfig) -> Self {
        Self { limit: limit.into(), passed: 0, dropped: 0, drops: LogLimit::new() }
    }

    /// Moves frames as long as there are any and the tap takes them. Returns whether any were, and
    /// what to wait for.
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
        let mut used = false;
        let mut left = BUDGET;
        queue.disable_notification(memory).map_err(|e| e.to_string())?;
        loop {
            if let Some(until) = self.limit.wait() {
                return Ok((used, Wait::Until(until)));
            }
            if left == 0 {
                return Ok((used, Wait::Until(Instant::now())));
            }
            left -= 1;
            let Some(chain) = queue.iter(memory).map_err(|e| e.to_string())?.next() else {
                match wait_for_driver(memory, queue)? {
                    Some(wait) => return Ok((used, wait)),
                    None => continue,
                }
            };
            let head = chain.head_index();
            let frame = Buffers::collect(memory, chain).map_err(|e| e.to_string())?.readable;
            if let Err(Full) = self.send(tap, features, frame) {
                queue.go_to_previous_position();
                return Ok((used, Wait::Tap));
            }
            queue.add_used(memory, head, 0).map_err(|e| e.to_string())?;
            used = true;
        }
    }

    /// Sends a frame or drops it.
    fn send(&mut self, tap: &Tap, features: u64, mut frame: Bytes<'_>) -> Result<(), Full> {
        let mut header = Header::default();
        if frame.read(&mut header.0) != header::SIZE {
            self.drop_frame(&"a frame without a whole header");
            return Ok(());
        }
        if let Err(why) = header.check_sent(features, frame.len()) {
            self.drop_frame(&why);
            return Ok(());
        }
        // One piece is the header's.
        if frame.piece_count() >= MAX_PIECES {
            self.drop_frame(&"a frame in too many pieces");
            return Ok(());
        }
        match tap.send(&header, &frame) {
            Ok(()) => {
                self.limit.take(frame.len(), header.packets(frame.len()));
                self.passed += 1;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(Full),
            Err(error) => self.drop_frame(&error),
        }
        Ok(())
    }

    fn drop_frame(&mut self, why: &dyn std::fmt::Display) {
        self.dropped += 1;
        if let Some(count) = self.drops.admit() {
            tracing::debug!(count, "frame of the guest dropped: {why}");
        }
    }
}
