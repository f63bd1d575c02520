//! Queues whose every field can be set to anything.

use core::sync::atomic::{AtomicU16, Ordering, fence};

/// Descriptors in each queue.
pub const SIZE: u16 = 16;
/// The most queues of a device.
pub const QUEUES: u32 = 3;
/// Descriptors in each indirect table: more than in a queue.
pub const INDIRECT: u16 = 64;
/// Bytes of each queue's buffer.
pub const BUFFER: u64 = 128 << 10;

/// Flags of descriptors: another follows.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// What it describes are descriptors.
pub const TABLE: u16 = 4;

const SLOTS: usize = SIZE as usize;

#[derive(Clone, Copy)]
#[repr(C)]
pub struct Descriptor {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    pub next: u16,
}

const EMPTY: Descriptor = Descriptor { address: 0, length: 0, flags: 0, next: 0 };

#[repr(C, align(4096))]
struct Area {
    descriptors: [Descriptor; SLOTS],
    indirect: [Descriptor; INDIRECT as usize],
    available_flags: u16,
    available_index: AtomicU16,
    available: [u16; SLOTS],
    used_event: u16,
    padding: u16,
    used_flags: u16,
    used_index: AtomicU16,
    used: [[u32; 2]; SLOTS],
    available_event: u16,
    buffer: [u8; BUFFER as usize],
}

static mut AREAS: [Area; QUEUES as usize] = [const {
    Area {
        descriptors: [EMPTY; SLOTS],
        indirect: [EMPTY; INDIRECT as usize],
        available_flags: 0,
        available_index: AtomicU16::new(0),
        available: [0; SLOTS],
        used_event: 0,
        padding: 0,
        used_flags: 0,
        used_index: AtomicU16::new(0),
        used: [[0; 2]; SLOTS],
        available_event: 0,
        buffer: [0; BUFFER as usize],
    }
}; QUEUES as usize];

/// A queue, by its number. Every device has the same memory for its own.
#[derive(Clone, Copy)]
pub struct Raw(*mut Area);

// What lies in the areas is plain data, of which the device may change any at any time: all accesses
// are volatile or atomic, and stay within.
impl Raw {
    pub fn of(queue: u32) -> Self {
        // SAFETY: an element of a static; no reference is made.
        Self(unsafe { &raw mut AREAS[queue as usize % QUEUES as usize] })
    }

    /// Empties everything but the buffer.
    pub fn clear(self) {
        (0..SIZE).for_each(|index| self.describe(index, EMPTY));
        (0..INDIRECT).for_each(|index| self.describe_indirect(index, EMPTY));
        // SAFETY: as above.
        unsafe {
            for slot in 0..SLOTS {
                (&raw mut (*self.0).available[slot]).write_volatile(0);
            }
            (*self.0).available_index.store(0, Ordering::SeqCst);
            (*self.0).used_index.store(0, Ordering::SeqCst);
            (&raw mut (*self.0).available_flags).write_volatile(0);
            (&raw mut (*self.0).used_event).write_volatile(0);
        }
    }

    /// The addresses of the descriptors, the driver's area and the device's area.
    pub fn places(self) -> [u64; 3] {
        // SAFETY: only addresses are taken.
        unsafe {
            [
                (&raw const (*self.0).descriptors).addr() as u64,
                (&raw const (*self.0).available_flags).addr() as u64,
                (&raw const (*self.0).used_flags).addr() as u64,
            ]
        }
    }

    /// The buffer's address.
    pub fn buffer(self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).buffer).addr() as u64 }
    }

    /// The indirect table's address.
    pub fn table(self) -> u64 {
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).indirect).addr() as u64 }
    }

    pub fn describe(self, index: u16, descriptor: Descriptor) {
        let at = usize::from(index % SIZE);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).descriptors[at]).write_volatile(descriptor) }
    }

    pub fn describe_indirect(self, index: u16, descriptor: Descriptor) {
        let at = usize::from(index % INDIRECT);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).indirect[at]).write_volatile(descriptor) }
    }

    /// Describes a chain from descriptor 0 on: address, length, and whether the device writes.
    pub fn chain(self, parts: &[(u64, u32, bool)]) {
        for (index, (address, length, written)) in parts.iter().enumerate() {
            let last = index + 1 == parts.len();
            let flags = if last { 0 } else { NEXT } | if *written { WRITE } else { 0 };
            let next = index as u16 + 1;
            self.describe(
                index as u16,
                Descriptor { address: *address, length: *length, flags, next },
            );
        }
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(self, head: u16) {
        let index = self.available();
        let slot = usize::from(index % SIZE);
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).available[slot]).write_volatile(head) };
        self.set_available(index.wrapping_add(1));
    }

    /// How many chains have been made available.
    pub fn available(self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.0).available_index.load(Ordering::SeqCst) }
    }

    pub fn set_available(self, index: u16) {
        // SAFETY: as above.
        unsafe { (*self.0).available_index.store(index, Ordering::SeqCst) };
        fence(Ordering::SeqCst);
    }

    /// Says after which used chain the driver wants to be interrupted (`VIRTIO_F_EVENT_IDX`).
    pub fn set_used_event(self, index: u16) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).used_event).write_volatile(index) };
    }

    /// Says by bit 0 that the driver wants no interrupts, where that event index isn't agreed on.
    pub fn set_available_flags(self, flags: u16) {
        // SAFETY: as above.
        unsafe { (&raw mut (*self.0).available_flags).write_volatile(flags) };
        fence(Ordering::SeqCst);
    }

    /// How many chains have been used.
    pub fn used(self) -> u16 {
        // SAFETY: as above.
        unsafe { (*self.0).used_index.load(Ordering::SeqCst) }
    }

    /// The head of the chain that was used as the `index`th, and how many bytes the device says it has
    /// written there.
    pub fn used_chain(self, index: u16) -> [u32; 2] {
        let slot = usize::from(index % SIZE);
        // SAFETY: as above.
        unsafe { (&raw const (*self.0).used[slot]).read_volatile() }
    }

    /// Puts bytes into the buffer.
    pub fn put(self, offset: u64, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            let at = (offset as usize + index) % BUFFER as usize;
            // SAFETY: as above.
            unsafe { (&raw mut (*self.0).buffer[at]).write_volatile(*byte) };
        }
    }

    /// Gets bytes from the buffer.
    pub fn get<const N: usize>(self, offset: u64) -> [u8; N] {
        core::array::from_fn(|index| {
            let at = (offset as usize + index) % BUFFER as usize;
            // SAFETY: as above.
            unsafe { (&raw const (*self.0).buffer[at]).read_volatile() }
        })
    }
}
