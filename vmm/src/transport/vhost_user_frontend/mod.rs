//! A device of the kvm engine whose queues another process serves over vhost-user.
//!
//! The transport keeps the registers; this [`Backend`] hands guest memory, the driver's queues, their
//! doorbells and the device's interrupt to the process at the other end of a connected socket. From
//! then on no request passes through this one. The configuration space is held here.
//!
//! The other process raises the interrupt by itself and so can't set `InterruptStatus`: the
//! transport reads its bit 0 as always set for such a device (see [`Interrupt::status`]).
//!
//! The peer must offer `VHOST_USER_F_PROTOCOL_FEATURES` with `MQ`, `REPLY_ACK` and `RESET_DEVICE`:
//! with those each step is known to be done before the next, and a reset leaves nobody behind that
//! still writes to guest memory. A peer that goes away while its queues are served makes the device
//! need a reset that can't succeed; whoever made the device is told (`on_lost`).

mod watch;

use std::io;
use std::os::unix::net::UnixStream;

use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueT};
use vm_memory::GuestMemory as _;
use vmm_sys_util::eventfd::EventFd;

use super::{ActivateError, Activation, Backend};
use crate::GuestMemory;
use crate::virtio::{fs, read_config_bytes};
use watch::Watch;

#[cfg(doc)]
use super::Interrupt;

/// Bits of vhost-user's own among the feature bits: the driver must not see them.
const NOT_VIRTIO: u64 =
    VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() | VhostUserVirtioFeatures::LOG_ALL.bits();

/// The most bytes of a file system's tag (virtio 1.2, section 5.11.4).
pub const MAX_TAG_LENGTH: usize = 36;

/// What a device is, besides what its process offers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Description {
    /// The device id of virtio 1.2, section 5.
    pub device_type: u32,
    /// The largest size of each queue.
    pub queue_max_sizes: Vec<u16>,
    /// The configuration space, which the driver can't write.
    pub config: Vec<u8>,
}

impl Description {
    /// A file system (virtio 1.2, section 5.11) with the queues of kiln's fs backend.
    ///
    /// # Errors
    /// When the tag is empty or longer than [`MAX_TAG_LENGTH`].
    pub fn file_system(tag: &str) -> Result<Self, FrontendError> {
        if tag.is_empty() || tag.len() > MAX_TAG_LENGTH {
            return Err(FrontendError::Tag(tag.to_owned()));
        }
        let request_queues = fs::QUEUES as u32 - 1;
        let mut config = tag.as_bytes().to_vec();
        config.resize(MAX_TAG_LENGTH, 0);
        config.extend(request_queues.to_le_bytes());
        Ok(Self { device_type: 26, queue_max_sizes: vec![fs::QUEUE_SIZE; fs::QUEUES], config })
    }
}

/// Why the process at the other end can't serve a device.
#[derive(Debug, thiserror::Error)]
pub enum FrontendError {
    /// The tag of a file system.
    #[error("the tag {0:?} has not 1 to {MAX_TAG_LENGTH} bytes")]
    Tag(String),
    /// The connection.
    #[error("cannot {what} over vhost-user: {reason}")]
    Peer {
        /// What was to be done.
        what: &'static str,
        /// Why it failed.
        reason: String,
    },
    /// The peer is none of kiln's, or of another version.
    #[error("the device process does not offer {0}")]
    Missing(&'static str),
    /// Watching the connection.
    #[error("cannot watch the device process")]
    Watch(#[source] io::Error),
}

fn peer<T>(what: &'static str, result: vhost::Result<T>) -> Result<T, FrontendError> {
    result.map_err(|error| FrontendError::Peer { what, reason: error.to_string() })
}

/// A device served by another process.
pub struct VhostUserBackend {
    frontend: Frontend,
    watch: Watch,
    description: Description,
    /// What the peer offers, vhost-user's own bits included.
    offered: u64,
    /// The queues that the peer serves now.
    active: Vec<usize>,
}

impl VhostUserBackend {
    /// Agrees with the process at the other end of `socket` on what both can do. `on_lost` is called
    /// at most once, from another thread, when that process goes away before this is dropped.
    ///
    /// # Errors
    /// See [`FrontendError`].
    pub fn new(
        socket: UnixStream,
        description: Description,
        on_lost: impl FnOnce() + Send + 'static,
    ) -> Result<Self, FrontendError> {
        let watch = Watch::new(&socket, on_lost).map_err(FrontendError::Watch)?;
        let queues = description.queue_max_sizes.len();
        let mut frontend = Frontend::from_stream(socket, queues as u64);
        peer("claim the device", frontend.set_owner())?;
        let offered = peer("get features", frontend.get_features())?;
        if offered & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(FrontendError::Missing("vhost-user protocol features"));
        }
        let protocol = peer("get protocol features", frontend.get_protocol_features())?;
        let needed = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE;
        if !protocol.contains(needed) {
            return Err(FrontendError::Missing("MQ, REPLY_ACK and RESET_DEVICE"));
        }
        peer("set protocol features", frontend.set_protocol_features(needed))?;
        frontend.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let served = peer("get the number of queues", frontend.get_queue_num())?;
        if served < queues as u64 {
            return Err(FrontendError::Missing("all queues of the device"));
        }
        Ok(Self { frontend, watch, description, offered, active: Vec::new() })
    }

    fn start(&mut self, activation: &Activation) -> Result<(), FrontendError> {
        let features = activation.features | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        peer("set features", self.frontend.set_features(features & self.offered))?;
        let regions = memory_regions(&activation.memory)?;
        peer("share guest memory", self.frontend.set_mem_table(&regions))?;
        let queues = std::iter::zip(&activation.queues, &activation.doorbells).enumerate();
        for (index, (queue, doorbell)) in queues.filter(|(_, (queue, _))| queue.ready()) {
            self.active.push(index);
            let interrupt = &activation.interrupt.eventfd;
            peer("start a queue", self.start_queue(index, queue, doorbell, interrupt))?;
            // What was made available before the peer listened. Fails only on a full counter.
            let _ = doorbell.write(1);
        }
        Ok(())
    }

    fn start_queue(
        &mut self,
        index: usize,
        queue: &Queue,
        doorbell: &EventFd,
        interrupt: &EventFd,
    ) -> vhost::Result<()> {
        let frontend = &mut self.frontend;
        frontend.set_vring_num(index, queue.size())?;
        frontend.set_vring_base(index, queue.next_avail())?;
        let addresses = VringConfigData {
            queue_max_size: self.description.queue_max_sizes[index],
            queue_size: queue.size(),
            flags: 0,
            // The memory table gives guest-physical addresses as this process's, which the peer has
            // no use for.
            desc_table_addr: queue.desc_table(),
            used_ring_addr: queue.used_ring(),
            avail_ring_addr: queue.avail_ring(),
            log_addr: None,
        };
        frontend.set_vring_addr(index, &addresses)?;
        // The doorbell last: the peer may then begin, and will want to tell.
        frontend.set_vring_call(index, interrupt)?;
        frontend.set_vring_kick(index, doorbell)?;
        frontend.set_vring_enable(index, true)
    }

    fn stop(&mut self) -> Result<(), FrontendError> {
        self.watch.forget_driver();
        if self.active.is_empty() {
            return Ok(());
        }
        for index in std::mem::take(&mut self.active) {
            peer("stop a queue", self.frontend.set_vring_enable(index, false))?;
            peer("stop a queue", self.frontend.get_vring_base(index))?;
        }
        peer("reset the device", self.frontend.reset_device())
    }
}

/// Guest memory as the peer is to map it.
fn memory_regions(memory: &GuestMemory) -> Result<Vec<VhostUserMemoryRegionInfo>, FrontendError> {
    let region = |region| {
        let info = VhostUserMemoryRegionInfo::from_guest_region(region);
        let mut info = peer("share guest memory", info)?;
        info.userspace_addr = info.guest_phys_addr;
        Ok(info)
    };
    memory.iter().map(region).collect()
}

impl Backend for VhostUserBackend {
    fn device_type(&self) -> u32 {
        self.description.device_type
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.description.queue_max_sizes
    }

    fn features(&self) -> u64 {
        self.offered & !NOT_VIRTIO
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.description.config, offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn is_remote(&self) -> bool {
        true
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.watch.tell_driver(activation.interrupt.clone());
        self.start(&activation).map_err(|error| ActivateError::Peer(error.to_string()))
    }

    fn reset(&mut self) {
        if let Err(error) = self.stop() {
            // A peer that has gone touches nothing any more; one that disobeys is about to be ended
            // with the whole sandbox.
            tracing::warn!(%error, "device process could not be reset");
            self.watch.lose();
        }
    }
}
