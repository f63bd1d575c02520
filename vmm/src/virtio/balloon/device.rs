//! The device: its queues and its life.

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::desc::split::Descriptor;
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use crate::GuestMemory;
use crate::log_limit::LogLimit;
use crate::memory;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// The queue in which free memory is reported. The specification numbers it 4, behind queues of
/// features that are not offered here; Linux counts only those that are there
/// (`drivers/virtio/virtio_mmio.c`: `vm_find_vqs`), and other machine monitors follow it.
const REPORTS: u16 = 2;

/// Inflate, deflate, and reports. Linux reports 32 ranges at once
/// (`include/linux/page_reporting.h`: `PAGE_REPORTING_CAPACITY`).
const QUEUE_SIZES: [u16; 3] = [128, 128, 32];

/// `VIRTIO_BALLOON_F_REPORTING`. Without `VIRTIO_BALLOON_F_PAGE_POISON` beside it a guest that fills
/// its free pages with a pattern reports nothing.
const REPORTING: u64 = 1 << 5;

/// Size of `struct virtio_balloon_config`.
const CONFIG_SIZE: usize = 16;

/// A balloon without air, by which the guest reports its free memory.
#[derive(Debug, Default)]
pub struct Balloon {
    failures: LogLimit,
}

impl Balloon {
    /// The device.
    #[must_use]
    pub fn new() -> Self {
        Self { failures: LogLimit::new() }
    }

    fn serve(
        &self,
        memory: &GuestMemory,
        queue: &mut Queue,
        mut take: impl FnMut(&Self, Descriptor) -> Result<(), String>,
    ) -> Result<bool, String> {
        let mut used = false;
        loop {
            queue.disable_notification(memory).map_err(|error| error.to_string())?;
            while let Some(chain) = queue.iter(memory).map_err(|error| error.to_string())?.next() {
                let head = chain.head_index();
                for descriptor in chain {
                    take(self, descriptor)?;
                }
                queue.add_used(memory, head, 0).map_err(|error| error.to_string())?;
                used = true;
            }
            if !queue.enable_notification(memory).map_err(|error| error.to_string())? {
                return Ok(used);
            }
        }
    }

    /// Gives a range of guest memory back that the guest says is free: one that the device may write.
    fn give_back(&self, memory: &GuestMemory, free: &Descriptor) -> Result<(), String> {
        if !free.is_write_only() {
            return Ok(());
        }
        match memory::give_back(memory, free.addr(), free.len().into()) {
            Ok(()) => Ok(()),
            Err(memory::GiveBackError::Outside) => {
                let (address, length) = (free.addr().0, free.len());
                Err(format!("free memory where there is none: {length} bytes at {address:#x}"))
            }
            Err(memory::GiveBackError::Host(error)) => {
                if let Some(count) = self.failures.admit() {
                    tracing::warn!(count, %error, "free memory of the guest can't be given back");
                }
                Ok(())
            }
        }
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        REPORTING
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[0; CONFIG_SIZE], offset, data);
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let Event::Queue(index) = event else { return Ok(Used::NONE) };
        let memory = queues.memory;
        let Some(queue) = queues.queues.get_mut(usize::from(index)) else {
            return Ok(Used::NONE);
        };
        let served = match index {
            REPORTS => self.serve(memory, queue, |balloon, free| balloon.give_back(memory, &free)),
            _ => self.serve(memory, queue, |_, _| Ok(())),
        };
        let mut used = Used::NONE;
        if served.map_err(|reason| DeviceError::Queue { queue: index, reason })? {
            used.add(index);
        }
        Ok(used)
    }

    fn reset(&mut self) {}
}
