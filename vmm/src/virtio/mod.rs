//! The virtio devices, and what one must offer to be carried by any transport.
//!
//! A device is a directory. It implements [`VirtioDevice`] over the queues it is handed and knows
//! nothing of registers, eventfds or sockets of the transport. A transport owns the queues, watches
//! the doorbells and the device's [host event fd](VirtioDevice::host_events), calls
//! [`VirtioDevice::process`], and signals the driver for the queues that the device names in
//! [`Used`].

pub mod balloon;
pub mod block;
pub mod buffers;
#[cfg(test)]
pub(crate) mod chains;
pub mod console;
pub mod fs;
pub mod net;
mod rate;
#[cfg(test)]
pub(crate) mod ring;
pub mod rng;
mod timer;
pub mod vsock;

use std::os::fd::BorrowedFd;

use virtio_queue::Queue;

use crate::GuestMemory;

/// What woke a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The driver rang the doorbell of this queue. After activation a transport rings each queue
    /// once by itself, so that nothing made available early is missed.
    Queue(u16),
    /// [`VirtioDevice::host_events`] is readable. A transport may also say so while the driver is
    /// away: the queues are then not [ready](virtio_queue::QueueT::ready).
    Host,
}

/// The queues of an activated device, with the memory they lie in.
pub struct Queues<'a, 'q> {
    /// The guest's memory.
    pub memory: &'a GuestMemory,
    /// All queues of the device, in virtio's order.
    pub queues: &'a mut [&'q mut Queue],
}

/// The queues in which a device has used buffers: the transport signals the driver unless it asked
/// not to be (`VRING_AVAIL_F_NO_INTERRUPT`, `used_event`).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Used(u64);

impl Used {
    /// Nothing was used.
    pub const NONE: Self = Self(0);

    /// Adds a queue, 0 to 63.
    pub fn add(&mut self, queue: u16) {
        debug_assert!(queue < 64);
        self.0 |= 1u64.checked_shl(queue.into()).unwrap_or(0);
    }

    /// Whether a queue is among them.
    pub fn contains(self, queue: u16) -> bool {
        self.0 & 1u64.checked_shl(queue.into()).unwrap_or(0) != 0
    }
}

/// Why a device cannot go on until its driver resets it.
///
/// These are breaches of the protocol that leave no way to answer in the queue (a descriptor chain
/// that loops, a ring outside of memory), or a failure of the host that no status can carry. What
/// can be answered in the queue (a request past the end of a disk) is answered there instead.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver's queue is broken.
    #[error("queue {queue} is broken: {reason}")]
    Queue {
        /// Index of the queue.
        queue: u16,
        /// What is wrong with it.
        reason: String,
    },
    /// The host failed.
    #[error("{what}")]
    Host {
        /// What the device was doing.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

/// A virtio device, whatever transport carries it.
///
/// All methods are called from one thread at a time. Feature bits of the transport and the ring
/// (`VERSION_1`, `RING_EVENT_IDX`, `RING_INDIRECT_DESC`) are the transport's and `virtio-queue`'s
/// business; [`VirtioDevice::features`] names only the device's own bits.
pub trait VirtioDevice: Send {
    /// The device id of virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// The largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// The device's own feature bits (0 to 23 and 50 to 63).
    fn features(&self) -> u64 {
        0
    }

    /// What the driver accepted, among all bits offered. Called before activation.
    fn ack_features(&mut self, _features: u64) {}

    /// Reads the device's configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device's configuration space; what isn't writable is ignored.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    /// A file descriptor, usually an epoll instance of the device's own, that is readable while
    /// the host side has work for the device. It stays the same for the device's whole life.
    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Does the work that `event` announces. Never blocks on the guest.
    ///
    /// # Errors
    /// See [`DeviceError`]; the transport then reports `DEVICE_NEEDS_RESET`, logs the error once
    /// and calls the device no more until [`VirtioDevice::reset`].
    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError>;

    /// Forgets everything about the driver: the state after construction. Host resources stay.
    fn reset(&mut self);
}

/// Serves a read of a configuration space that is held as bytes: what lies past its end is zero.
pub fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(available) = usize::try_from(offset).ok().and_then(|start| config.get(start..)) else {
        return;
    };
    let length = available.len().min(data.len());
    data[..length].copy_from_slice(&available[..length]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_reads_past_the_end_are_zero() {
        let mut data = [0xff; 4];
        read_config_bytes(&[1, 2, 3], 2, &mut data);
        assert_eq!(data, [3, 0, 0, 0]);
        read_config_bytes(&[1, 2, 3], u64::MAX, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn used_names_its_queues() {
        let mut used = Used::NONE;
        used.add(2);
        assert!(used.contains(2));
        assert!(!used.contains(1) && !used.contains(64));
    }
}
