//! What carries virtio devices to a guest.
//!
//! `mmio` is the kvm engine's: registers in guest-physical memory, doorbells through ioeventfd,
//! interrupts through irqfd. A device behind it is a [`Backend`]: one of this process
//! ([`VirtioDevice`](crate::virtio::VirtioDevice) on a worker thread), or one that another process
//! serves over vhost-user. `vhost_user` carries a `VirtioDevice` to QEMU.

pub mod mmio;
pub mod vhost_user;
pub mod vhost_user_frontend;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

/// A device behind a virtio-mmio transport, wherever its queues are served.
pub trait Backend: Send {
    /// The device id of virtio 1.2, section 5.
    fn device_type(&self) -> u32;

    /// The largest size of each queue; its length is the number of queues.
    fn queue_max_sizes(&self) -> &[u16];

    /// Every feature bit offered, the transport's and the ring's included.
    fn features(&self) -> u64;

    /// Reads the configuration space; bytes past its end read as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the configuration space; what isn't writable is ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// Whether another process serves the queues and raises the interrupt by itself, so that it
    /// can't set [`Interrupt::status`].
    fn is_remote(&self) -> bool {
        false
    }

    /// Begins to serve the queues: the driver has set `DRIVER_OK`.
    ///
    /// # Errors
    /// The transport then sets `DEVICE_NEEDS_RESET`.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;

    /// Stops serving; when it returns nothing touches the queues or guest memory any more.
    fn reset(&mut self);
}

/// What a backend gets to serve its queues with.
pub struct Activation {
    /// The guest's memory.
    pub memory: GuestMemory,
    /// The feature bits that the driver accepted.
    pub features: u64,
    /// The queues as the driver set them up, validated; one that isn't ready is not served.
    pub queues: Vec<Queue>,
    /// The doorbell of each queue.
    pub doorbells: Vec<EventFd>,
    /// Tells the driver.
    pub interrupt: Interrupt,
}

/// A virtio-mmio device's interrupt line.
#[derive(Clone)]
pub struct Interrupt {
    /// The `InterruptStatus` register: bit 0 used buffers, bit 1 configuration change. Set it
    /// before writing to the eventfd. A backend whose queues another process serves can't: its
    /// transport reads bit 0 as always set.
    pub status: Arc<AtomicU32>,
    /// Raises the interrupt when written to (irqfd).
    pub eventfd: Arc<EventFd>,
    /// The `Status` register's `DEVICE_NEEDS_RESET` bit is set by storing true.
    pub needs_reset: Arc<std::sync::atomic::AtomicBool>,
}

/// Why a backend could not begin to serve its queues.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// An operating system resource.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The process that serves the queues.
    #[error("device process failed: {0}")]
    Peer(String),
}
