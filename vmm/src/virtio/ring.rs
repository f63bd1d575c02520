//! A driver's side of a split virtqueue, for tests.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::GuestMemory;

/// A queue in `memory`, with what its driver keeps of it.
pub(crate) struct Ring<'m> {
    memory: &'m GuestMemory,
    /// The device's side.
    pub queue: Queue,
    descriptors: u64,
    available: u64,
    used: u64,
    size: u16,
    next_descriptor: u16,
    offered: u16,
}

const DESCRIPTOR_NEXT: u16 = 1;
const DESCRIPTOR_WRITE: u16 = 2;

impl<'m> Ring<'m> {
    /// Lays a queue of `size` entries out from `base` on; it takes less than 0x3000 bytes for up to
    /// 256 entries.
    pub fn new(memory: &'m GuestMemory, base: u64, size: u16) -> Self {
        let (descriptors, available, used) = (base, base + 0x1000, base + 0x2000);
        let mut queue = Queue::new(size).unwrap();
        queue.try_set_desc_table_address(GuestAddress(descriptors)).unwrap();
        queue.try_set_avail_ring_address(GuestAddress(available)).unwrap();
        queue.try_set_used_ring_address(GuestAddress(used)).unwrap();
        queue.set_ready(true);
        let next_descriptor = 0;
        Self { memory, queue, descriptors, available, used, size, next_descriptor, offered: 0 }
    }

    /// Addresses of descriptor table, available and used ring.
    pub fn addresses(&self) -> [u64; 3] {
        [self.descriptors, self.available, self.used]
    }

    /// Makes a chain of `(address, length, writable)` buffers available.
    pub fn offer(&mut self, buffers: &[(u64, u32, bool)]) {
        let head = self.next_descriptor % self.size;
        for (index, (address, length, writable)) in buffers.iter().enumerate() {
            let last = index + 1 == buffers.len();
            let flags = if *writable { DESCRIPTOR_WRITE } else { 0 };
            let flags = if last { flags } else { flags | DESCRIPTOR_NEXT };
            let at = self.descriptors + u64::from(self.next_descriptor % self.size) * 16;
            self.next_descriptor = self.next_descriptor.wrapping_add(1);
            let next = self.next_descriptor % self.size;
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            self.memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(next, GuestAddress(at + 14)).unwrap();
        }
        let slot = self.available + 4 + u64::from(self.offered % self.size) * 2;
        self.memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.offered = self.offered.wrapping_add(1);
        let index = GuestAddress(self.available + 2);
        self.memory.store(self.offered, index, Ordering::Release).unwrap();
    }

    /// How many chains were used so far.
    pub fn used_count(&self) -> u16 {
        self.memory.load(GuestAddress(self.used + 2), Ordering::Acquire).unwrap()
    }

    /// All used chains so far, in order: head and length written.
    pub fn used(&self) -> Vec<(u32, u32)> {
        (0..self.used_count())
            .map(|index| {
                let at = self.used + 4 + u64::from(index % self.size) * 8;
                let head = self.memory.read_obj(GuestAddress(at)).unwrap();
                (head, self.memory.read_obj(GuestAddress(at + 4)).unwrap())
            })
            .collect()
    }
}
