//! The device: its queue and its life.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::config::{self, QUEUE_SIZE};
use super::disk::{Disk, OpenError};
use super::request::{Id, Target};
use crate::GuestMemory;
use crate::config::DiskLimits;
use crate::virtio::buffers::Buffers;
use crate::virtio::rate::Limit;
use crate::virtio::timer::Timer;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// A virtio-blk device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    id: Id,
    read_only: bool,
    limit: Limit,
    /// Wakes it when the limit allows another request; nothing where there is none.
    timer: Option<Timer>,
}

impl Block {
    /// A disk of a raw image file or a block device, opened for reading, and for writing unless
    /// `read_only`. `id` is what the guest reads as the disk's serial number; of it 20 bytes count.
    ///
    /// # Errors
    /// A file that can't be a disk.
    pub fn new(file: File, read_only: bool, id: &str) -> Result<Self, OpenError> {
        let mut padded = Id::default();
        let length = id.len().min(padded.len());
        padded[..length].copy_from_slice(&id.as_bytes()[..length]);
        let disk = Disk::new(file, read_only)?;
        Ok(Self { disk, id: padded, read_only, limit: Limit::default(), timer: None })
    }

    /// The same, and no faster than this.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn limited(mut self, limits: DiskLimits) -> Result<Self, OpenError> {
        if limits != DiskLimits::default() {
            self.limit = limits.into();
            self.timer = Some(Timer::new().map_err(OpenError::Timer)?);
        }
        Ok(self)
    }

    /// Arranges to be woken when another request may be served; false if it may be now.
    fn has_to_wait(&mut self) -> io::Result<bool> {
        let Some(timer) = &mut self.timer else { return Ok(false) };
        match self.limit.wait() {
            Some(until) => timer.ring_at(until).map(|()| true),
            None => Ok(false),
        }
    }

    fn serve(&mut self, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, String> {
        let mut used = false;
        loop {
            queue.disable_notification(memory).map_err(|error| error.to_string())?;
            loop {
                // What waits stays in the queue, which its driver need not ring for.
                if self.has_to_wait().map_err(|error| error.to_string())? {
                    return Ok(used);
                }
                let chain = queue.iter(memory).map_err(|error| error.to_string())?.next();
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let buffers = Buffers::collect(memory, chain).map_err(|error| error.to_string())?;
                let target = Target { disk: &self.disk, id: &self.id, read_only: self.read_only };
                let served = target.serve(buffers).ok_or("a request has no status byte")?;
                self.limit.take(served.bytes, 1);
                queue.add_used(memory, head, served.written).map_err(|error| error.to_string())?;
                used = true;
            }
            if !queue.enable_notification(memory).map_err(|error| error.to_string())? {
                return Ok(used);
            }
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        config::features(self.read_only)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&config::space(self.disk.sectors()), offset, data);
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        self.timer.as_ref().map(Timer::as_fd)
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let mut used = Used::NONE;
        if let (Event::Host, Some(timer)) = (event, &mut self.timer) {
            timer.calm();
        }
        let (Event::Queue(0) | Event::Host, [queue, ..]) = (event, &mut *queues.queues) else {
            return Ok(used);
        };
        if !queue.ready() {
            return Ok(used);
        }
        let served = self.serve(queues.memory, queue);
        if served.map_err(|reason| DeviceError::Queue { queue: 0, reason })? {
            used.add(0);
        }
        Ok(used)
    }

    fn reset(&mut self) {
        if let Some(Err(error)) = self.timer.as_mut().map(Timer::stop) {
            tracing::warn!("a disk's timer can't be stopped: {error}");
        }
    }
}
