//! A queue as its driver sets it up, register by register, until it says that it is ready and what
//! it wrote is found to be a queue.

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _};

use crate::GuestMemory;

/// Sizes in bytes of a split virtqueue's parts (virtio 1.2, sections 2.7.5, 2.7.6 and 2.7.8): what
/// a ring takes beside its entries, and each entry.
const DESCRIPTOR_SIZE: u64 = 16;
const RING_OVERHEAD: u64 = 6;
const AVAILABLE_ENTRY: u64 = 2;
const USED_ENTRY: u64 = 8;

/// A queue during set-up.
pub(super) struct QueueSetup {
    max_size: u16,
    /// As the driver wrote it.
    pub size: u32,
    /// Address of the descriptor table.
    pub descriptors: u64,
    /// Address of the available ring.
    pub available: u64,
    /// Address of the used ring.
    pub used: u64,
    ready: bool,
    /// The checked queue, until it is handed to the backend.
    queue: Option<Queue>,
}

/// Why what a driver set up is no queue.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error("its size {0} is not a power of two up to {1}")]
    Size(u32, u16),
    #[error("its {0} is not aligned")]
    Alignment(&'static str),
    #[error("its {0} does not lie in memory")]
    Outside(&'static str),
}

impl QueueSetup {
    pub fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            descriptors: 0,
            available: 0,
            used: 0,
            ready: false,
            queue: None,
        }
    }

    pub fn max_size(&self) -> u16 {
        self.max_size
    }

    pub fn is_ready(&self) -> bool {
        self.ready
    }

    /// Checks what the driver wrote and takes it for a queue.
    pub fn make_ready(&mut self, memory: &GuestMemory, event_idx: bool) -> Result<(), SetupError> {
        if self.ready {
            return Ok(());
        }
        let size_error = || SetupError::Size(self.size, self.max_size);
        let mut queue = Queue::new(self.max_size).map_err(|_| size_error())?;
        let size = u16::try_from(self.size).map_err(|_| size_error())?;
        queue.try_set_size(size).map_err(|_| size_error())?;
        queue
            .try_set_desc_table_address(GuestAddress(self.descriptors))
            .map_err(|_| SetupError::Alignment("descriptor table"))?;
        queue
            .try_set_avail_ring_address(GuestAddress(self.available))
            .map_err(|_| SetupError::Alignment("available ring"))?;
        queue
            .try_set_used_ring_address(GuestAddress(self.used))
            .map_err(|_| SetupError::Alignment("used ring"))?;
        self.check_places(memory, size.into())?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        self.queue = Some(queue);
        self.ready = true;
        Ok(())
    }

    /// Each part lies in memory from its first to its last byte, the hole not between. (`Queue`
    /// itself only looks at where each part ends.)
    fn check_places(&self, memory: &GuestMemory, size: u64) -> Result<(), SetupError> {
        let parts = [
            ("descriptor table", self.descriptors, DESCRIPTOR_SIZE * size),
            ("available ring", self.available, RING_OVERHEAD + AVAILABLE_ENTRY * size),
            ("used ring", self.used, RING_OVERHEAD + USED_ENTRY * size),
        ];
        match parts.into_iter().find(|(_, start, length)| {
            start.checked_add(*length).is_none()
                || !memory.check_range(GuestAddress(*start), *length as usize)
        }) {
            Some((name, ..)) => Err(SetupError::Outside(name)),
            None => Ok(()),
        }
    }

    /// The driver takes it back before it was handed over.
    pub fn withdraw(&mut self) {
        self.ready = false;
        self.queue = None;
    }

    /// Hands the queue over; one that isn't ready says so itself.
    pub fn take(&mut self) -> Queue {
        self.queue.take().or_else(|| Queue::new(self.max_size).ok()).unwrap_or_default()
    }

    pub fn reset(&mut self) {
        *self = Self::new(self.max_size);
    }
}
