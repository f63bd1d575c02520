//! The device: its queue and its life.

use std::fs::File;

use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use super::config::{self, QUEUE_SIZE};
use super::disk::{Disk, OpenError};
use super::request::{Id, Target};
use crate::GuestMemory;
use crate::virtio::buffers::Buffers;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// A virtio-blk device.
#[derive(Debug)]
pub struct Block {
    disk: Disk,
    id: Id,
    read_only: bool,
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
        Ok(Self { disk: Disk::new(file, read_only)?, id: padded, read_only })
    }

    fn serve(&self, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, String> {
        let target = Target { disk: &self.disk, id: &self.id, read_only: self.read_only };
        let mut used = false;
        loop {
            queue.disable_notification(memory).map_err(|error| error.to_string())?;
            loop {
                let chain = queue.iter(memory).map_err(|error| error.to_string())?.next();
                let Some(chain) = chain else { break };
                let head = chain.head_index();
                let buffers = Buffers::collect(memory, chain).map_err(|error| error.to_string())?;
                let written = target.serve(buffers).ok_or("a request has no status byte")?;
                queue.add_used(memory, head, written).map_err(|error| error.to_string())?;
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

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let mut used = Used::NONE;
        let (Event::Queue(0), [queue, ..]) = (event, &mut *queues.queues) else {
            return Ok(used);
        };
        let served = self.serve(queues.memory, queue);
        if served.map_err(|reason| DeviceError::Queue { queue: 0, reason })? {
            used.add(0);
        }
        Ok(used)
    }

    fn reset(&mut self) {}
}
