//! A split virtqueue, the driver's side (virtio 1.2, section 2.7). The driver chooses the
//! descriptors of each chain itself; it keeps no list of free ones.

use core::sync::atomic::{AtomicU16, Ordering, fence};

/// Descriptors in every queue of these guests.
pub const SIZE: u16 = 16;
const SLOTS: usize = SIZE as usize;

const NEXT: u16 = 1;
const WRITE: u16 = 2;

#[derive(Clone, Copy)]
#[repr(C)]
struct Descriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// The memory of a queue.
#[repr(C, align(16))]
pub struct Ring {
    descriptors: [Descriptor; SLOTS],
    available_flags: u16,
    available_index: AtomicU16,
    available: [u16; SLOTS],
    used_event: u16,
    padding: u16,
    used_flags: u16,
    used_index: AtomicU16,
    used: [[u32; 2]; SLOTS],
    available_event: u16,
}

impl Ring {
    pub const fn new() -> Self {
        Self {
            descriptors: [Descriptor { address: 0, length: 0, flags: 0, next: 0 }; SLOTS],
            available_flags: 0,
            available_index: AtomicU16::new(0),
            available: [0; SLOTS],
            used_event: 0,
            padding: 0,
            used_flags: 0,
            used_index: AtomicU16::new(0),
            used: [[0; 2]; SLOTS],
            available_event: 0,
        }
    }

    /// Where the descriptors, the driver's area and the device's area are.
    pub fn addresses(&self) -> [u64; 3] {
        let driver = &raw const self.available_flags;
        let device = &raw const self.used_flags;
        [(&raw const self.descriptors).addr(), driver.addr(), device.addr()]
            .map(|address| address as u64)
    }
}

/// A part of a request.
#[derive(Clone, Copy)]
pub struct Buffer {
    address: u64,
    length: u32,
    writable: bool,
}

impl Buffer {
    /// What the device reads.
    pub fn read_by_device<T: ?Sized>(from: *const T, length: usize) -> Self {
        Self { address: from.cast::<u8>().addr() as u64, length: length as u32, writable: false }
    }

    /// What the device writes.
    pub fn written_by_device<T: ?Sized>(to: *mut T, length: usize) -> Self {
        Self { address: to.cast::<u8>().addr() as u64, length: length as u32, writable: true }
    }
}

/// A queue in use.
pub struct Queue {
    ring: *mut Ring,
    next_available: u16,
    next_used: u16,
}

impl Queue {
    pub fn new(ring: &'static mut Ring) -> Self {
        Self { ring, next_available: 0, next_used: 0 }
    }

    /// Makes a chain available, in the descriptors from `first` on, which must be free.
    pub fn offer(&mut self, first: u16, buffers: &[Buffer]) {
        for (index, buffer) in buffers.iter().enumerate() {
            let slot = (first + index as u16) % SIZE;
            let more = index + 1 < buffers.len();
            let descriptor = Descriptor {
                address: buffer.address,
                length: buffer.length,
                flags: if more { NEXT } else { 0 } | if buffer.writable { WRITE } else { 0 },
                next: (slot + 1) % SIZE,
            };
            // SAFETY: the ring lives for ever and its descriptor is the driver's at this time.
            unsafe {
                (&raw mut (*self.ring).descriptors[usize::from(slot)]).write_volatile(descriptor);
            }
        }
        let slot = usize::from(self.next_available % SIZE);
        self.next_available = self.next_available.wrapping_add(1);
        // SAFETY: as above; the index is stored after what it makes available.
        unsafe {
            (&raw mut (*self.ring).available[slot]).write_volatile(first % SIZE);
            (*self.ring).available_index.store(self.next_available, Ordering::Release);
        }
        fence(Ordering::SeqCst);
    }

    /// A chain that the device has used: its first descriptor and how many bytes were written.
    pub fn take_used(&mut self) -> Option<(u16, u32)> {
        // SAFETY: the ring lives for ever; the entry is read after the index that covers it.
        unsafe {
            if (*self.ring).used_index.load(Ordering::Acquire) == self.next_used {
                return None;
            }
            let slot = usize::from(self.next_used % SIZE);
            let [first, written] = (&raw const (*self.ring).used[slot]).read_volatile();
            self.next_used = self.next_used.wrapping_add(1);
            Some((first as u16, written))
        }
    }
}
