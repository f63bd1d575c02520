//! One queue as the front-end sets it up.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering;

use rustix::event::epoll;
use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};

use super::memory::MemoryTable;
use crate::GuestMemory;

/// A queue, with the descriptors that stand for its doorbell and its interrupt.
pub(super) struct Vring {
    pub(super) queue: Queue,
    index: u16,
    kick: Option<File>,
    call: Option<File>,
    error: Option<File>,
    enabled: bool,
}

impl Vring {
    pub(super) fn new(index: u16, max_size: u16) -> Result<Self> {
        let queue = Queue::new(max_size).map_err(|_| Error::InvalidParam)?;
        Ok(Self { queue, index, kick: None, call: None, error: None, enabled: false })
    }

    /// Whether the device may touch the queue.
    pub(super) fn is_served(&self) -> bool {
        self.queue.ready()
    }

    /// Whether the front-end wants the queue served.
    pub(super) fn is_wanted(&self) -> bool {
        self.enabled && self.kick.is_some()
    }

    pub(super) fn set_size(&mut self, size: u32) -> Result<()> {
        let size = u16::try_from(size).map_err(|_| Error::InvalidParam)?;
        self.queue.try_set_size(size).map_err(|_| Error::InvalidParam)
    }

    /// Takes the addresses of descriptor table, used and available ring, as the front-end has them.
    pub(super) fn set_addresses(
        &mut self,
        table: &MemoryTable,
        [descriptors, used, available]: [u64; 3],
    ) -> Result<()> {
        let invalid = |_| Error::InvalidParam;
        let address = table.guest_address(descriptors)?;
        self.queue.try_set_desc_table_address(address).map_err(invalid)?;
        let address = table.guest_address(used)?;
        self.queue.try_set_used_ring_address(address).map_err(invalid)?;
        let address = table.guest_address(available)?;
        self.queue.try_set_avail_ring_address(address).map_err(invalid)
    }

    pub(super) fn set_call(&mut self, call: Option<File>) {
        self.call = call;
    }

    pub(super) fn set_error(&mut self, error: Option<File>) {
        self.error = error;
    }

    /// Takes the doorbell, which starts the queue. The old one must not be watched any more.
    pub(super) fn set_kick(&mut self, kick: Option<File>) {
        self.kick = kick;
    }

    pub(super) fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Begins to serve the queue and watches its doorbell.
    pub(super) fn begin(&mut self, memory: &GuestMemory, epoll: BorrowedFd<'_>) -> Result<()> {
        let Some(kick) = &self.kick else {
            return Err(Error::InvalidOperation("no kick descriptor"));
        };
        self.queue.set_ready(true);
        let begun = if self.queue.is_valid(memory) {
            // A ring that was in use before goes on where the driver last looked.
            self.queue.used_idx(memory, Ordering::Acquire).map_err(|_| Error::InvalidParam)
        } else {
            Err(Error::InvalidParam)
        };
        let begun = begun.and_then(|used| {
            self.queue.set_next_used(used.0);
            let data = epoll::EventData::new_u64(self.index.into());
            epoll::add(epoll, kick, data, epoll::EventFlags::IN)
                .map_err(|error| Error::ReqHandlerError(error.into()))
        });
        self.queue.set_ready(begun.is_ok());
        begun
    }

    /// Stops serving the queue.
    pub(super) fn end(&mut self, epoll: BorrowedFd<'_>) {
        if !self.is_served() {
            return;
        }
        self.queue.set_ready(false);
        if let Some(kick) = &self.kick {
            let _ = epoll::delete(epoll, kick);
        }
    }

    /// Takes the doorbell's count away.
    pub(super) fn clear_kick(&mut self) -> io::Result<()> {
        let Some(kick) = &mut self.kick else { return Ok(()) };
        match kick.read(&mut [0; 8]) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(()),
        }
    }

    /// Interrupts the driver for used buffers, unless it asked not to be.
    pub(super) fn interrupt(&mut self, memory: &GuestMemory) {
        if self.queue.needs_notification(memory).unwrap_or(true) {
            ring(&mut self.call);
        }
    }

    /// Tells the front-end that the device has failed.
    pub(super) fn report_error(&mut self) {
        ring(&mut self.error);
    }
}

fn ring(eventfd: &mut Option<File>) {
    if let Some(eventfd) = eventfd {
        // Fails only for a descriptor that is no eventfd: the front-end's own loss.
        let _ = eventfd.write(&1u64.to_ne_bytes());
    }
}
