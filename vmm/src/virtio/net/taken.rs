//! Receive buffers that were taken from the guest's queue, to be filled with a frame or given back.

use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::header::{self, Header};
use crate::GuestMemory;
use crate::virtio::buffers::{Buffers, Bytes, MAX_PIECES};

/// Most pieces that a frame's buffers may have together: a system call's, without those of the
/// header and of what does not fit.
const PIECES: usize = MAX_PIECES - 2;

/// Buffers, in the queue's order.
#[derive(Debug, Default)]
pub(super) struct Taken<'m> {
    /// Where the header goes: the beginning of the first buffer.
    header: Bytes<'m>,
    chains: Vec<Chain<'m>>,
    room: usize,
    pieces: usize,
}

#[derive(Debug)]
struct Chain<'m> {
    head: u16,
    room: Bytes<'m>,
}

/// Why there isn't enough room.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shortage {
    /// The queue is empty: the driver may bring more.
    Queue,
    /// More can't be had, whatever the driver does.
    Buffers,
}

impl<'m> Taken<'m> {
    /// Takes buffers until a frame of `length` bytes has room, at least one. Only one if the driver
    /// does not expect frames to lie in several.
    ///
    /// # Errors
    /// A queue that is broken, or a buffer that can't hold a header.
    pub(super) fn take(
        &mut self,
        memory: &'m GuestMemory,
        queue: &mut Queue,
        length: usize,
        mergeable: bool,
    ) -> Result<Option<Shortage>, String> {
        let most = if mergeable { usize::from(queue.size()) } else { 1 };
        while self.chains.is_empty() || self.room < length {
            if self.chains.len() >= most {
                return Ok(Some(Shortage::Buffers));
            }
            let Some(chain) = queue.iter(memory).map_err(|e| e.to_string())?.next() else {
                return Ok(Some(Shortage::Queue));
            };
            let head = chain.head_index();
            let mut room = Buffers::collect(memory, chain).map_err(|e| e.to_string())?.writable;
            if room.len() < header::SIZE {
                return Err(format!("a receive buffer of {} bytes", room.len()));
            }
            if room.piece_count() > PIECES {
                return Err(format!("a receive buffer in {} pieces", room.piece_count()));
            }
            if self.pieces + room.piece_count() > PIECES {
                queue.go_to_previous_position();
                return Ok(Some(Shortage::Buffers));
            }
            self.pieces += room.piece_count();
            if self.chains.is_empty() {
                self.header = room.take_front(header::SIZE);
            }
            self.room += room.len();
            self.chains.push(Chain { head, room });
        }
        Ok(None)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.chains.is_empty()
    }

    pub(super) fn room(&self) -> usize {
        self.room
    }

    /// What a frame goes into.
    pub(super) fn buffers(&self) -> impl Iterator<Item = &Bytes<'m>> {
        self.chains.iter().map(|chain| &chain.room)
    }

    /// Copies the beginning of a frame out again.
    pub(super) fn copy_out(&self, mut frame: &mut [u8]) {
        for chain in &self.chains {
            let count = chain.room.clone().read(frame);
            frame = &mut frame[count..];
        }
    }

    /// Copies a frame in, as much of it as there is room for.
    pub(super) fn copy_in(&self, mut frame: &[u8]) {
        for chain in &self.chains {
            let count = chain.room.clone().write(frame);
            frame = &frame[count..];
        }
    }

    /// Gives the buffers back.
    pub(super) fn give_back(self, queue: &mut Queue) {
        give_back(queue, self.chains.len());
    }

    /// Passes a frame of `length` bytes, which lies in the buffers, to the guest, and gives the
    /// buffers back that are not needed for it.
    ///
    /// # Errors
    /// A queue that is broken.
    pub(super) fn finish(
        mut self,
        memory: &GuestMemory,
        queue: &mut Queue,
        mut header: Header,
        length: usize,
    ) -> Result<(), String> {
        let mut left = length;
        let mut used = Vec::with_capacity(self.chains.len());
        for chain in &self.chains {
            if left == 0 && !used.is_empty() {
                break;
            }
            let count = left.min(chain.room.len());
            left -= count;
            used.push((chain.head, count));
        }
        give_back(queue, self.chains.len() - used.len());
        // Lossless: no more than the queue has.
        header.set_buffers(used.len() as u16);
        self.header.write(&header.0);
        for (index, (head, count)) in used.into_iter().enumerate() {
            let count = if index == 0 { count + header::SIZE } else { count };
            // Lossless: no longer than a frame.
            queue.add_used(memory, head, count as u32).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}

fn give_back(queue: &mut Queue, count: usize) {
    // Lossless: no more than the queue has.
    queue.set_next_avail(queue.next_avail().wrapping_sub(count as u16));
}
