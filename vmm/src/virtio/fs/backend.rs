//! The virtio-fs device (virtio 1.2, section 5.11) as a vhost-user backend.
//!
//! A queue for `FUSE_FORGET` and the like and two for requests, one for each of two worker threads:
//! a second vCPU's requests are served while a first one's wait for the disk. The frontend keeps the
//! configuration space, tag included.
//!
//! A request that is over a limit waits in its queue, and its thread with it, which then holds nothing
//! that a reset or the process's end would wait for.
//!
//! Each thread has a file mode mask and working directory of its own (`CLONE_FS`), which the
//! library sets while it serves a request, as it does the thread's user and group.

use std::cell::Cell;
use std::io;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::thread::{UnshareFlags, unshare_unsafe};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::bitmap::BitmapMmapRegion;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{
    EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier,
};

use super::guarded::GuardedFs;
use super::request::RequestServer;
use super::throttle::Throttle;
use crate::config::FileLimits;
use crate::log_limit::LogLimit;

/// Queues of the device: one for high priority, the rest for requests.
pub const QUEUES: usize = 3;

/// The largest size of a queue, in descriptors.
pub const QUEUE_SIZE: u16 = 1024;

/// Which queues each worker thread serves, as a bit mask.
const QUEUES_OF_THREADS: [u64; 2] = [0b011, 0b100];

type Memory = GuestMemoryAtomic<GuestMemoryMmap<BitmapMmapRegion>>;

/// The device.
pub struct FsBackend {
    server: RequestServer,
    memory: RwLock<Option<Memory>>,
    event_idx: AtomicBool,
    breaches: LogLimit,
    throttle: Throttle,
}

impl FsBackend {
    /// A device that serves `file_system`, as fast as `limits` let it.
    pub fn new(file_system: GuardedFs, limits: FileLimits) -> Self {
        Self {
            server: RequestServer::new(file_system),
            memory: RwLock::new(None),
            event_idx: AtomicBool::new(false),
            breaches: LogLimit::new(),
            throttle: Throttle::new(limits),
        }
    }

    /// Serves what is available in a queue now.
    fn serve_available(&self, vring: &VringMutex<Memory>) -> io::Result<()> {
        while self.throttle.wait() && self.serve_next(vring)? {}
        Ok(())
    }

    /// Serves the next request in a queue; says whether there was one.
    fn serve_next(&self, vring: &VringMutex<Memory>) -> io::Result<bool> {
        let memory =
            self.memory.read().map_err(|_| io::Error::other("a worker thread panicked"))?;
        let memory = memory.as_ref().ok_or_else(|| io::Error::other("no memory table yet"))?;
        let memory = memory.memory();
        let chain = {
            let mut state = vring.get_mut();
            // A reset has taken the queue away, while this waited.
            if !state.is_enabled() || !state.get_queue().ready() {
                return Ok(false);
            }
            let chains = state.get_queue_mut().iter(memory.clone());
            chains.map_err(io::Error::other)?.next()
        };
        let Some(chain) = chain else {
            return Ok(false);
        };
        let head = chain.head_index();
        let reader = Reader::new(&memory, chain.clone());
        let writer = Writer::new(&memory, chain);
        let written = match (reader, writer) {
            (Ok(reader), Ok(writer)) => {
                let asked = reader.available_bytes();
                let written = self.server.serve(reader, writer);
                self.throttle.take(asked.saturating_add(written as usize));
                written
            }
            // Buffers that aren't in memory: nothing can be read and nobody told.
            _ => 0,
        };
        vring.add_used(head, written).map_err(io::Error::other)?;
        let notify = !self.event_idx.load(Ordering::Relaxed)
            || vring.needs_notification().map_err(io::Error::other)?;
        if notify {
            vring.signal_used_queue()?;
        }
        Ok(true)
    }

    /// Lets no request wait any more: the frontend has gone.
    pub fn end(&self) {
        self.throttle.lift();
    }
}

impl VhostUserBackend for FsBackend {
    type Bitmap = BitmapMmapRegion;
    type Vring = VringMutex<Memory>;

    fn num_queues(&self) -> usize {
        QUEUES
    }

    fn max_queue_size(&self) -> usize {
        QUEUE_SIZE.into()
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
            | 1 << VIRTIO_RING_F_EVENT_IDX
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
    }

    fn reset_device(&self) {
        // The queues are disabled by now. Whoever serves a request that was begun before holds this
        // lock; once it is had, nothing touches guest memory any more.
        let memory = self.memory.write();
        self.server.reset();
        drop(memory);
    }

    fn set_event_idx(&self, enabled: bool) {
        self.event_idx.store(enabled, Ordering::Relaxed);
    }

    fn update_memory(&self, memory: Memory) -> io::Result<()> {
        let mut current =
            self.memory.write().map_err(|_| io::Error::other("a worker thread panicked"))?;
        *current = Some(memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        QUEUES_OF_THREADS.to_vec()
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one a thread could not be ended, which only matters to a process that goes on
        // after its only frontend has left.
        new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC).ok()
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[VringMutex<Memory>],
        _thread: usize,
    ) -> io::Result<()> {
        own_file_system_attributes()?;
        // An error returned from here would end the thread for good. A driver that breaks its queue
        // can reset the device and do better.
        if let Err(error) = self.serve_queue(device_event, vrings)
            && let Some(count) = self.breaches.admit()
        {
            tracing::warn!(%error, count, "file system queue is broken");
        }
        Ok(())
    }
}

impl FsBackend {
    fn serve_queue(&self, index: u16, vrings: &[VringMutex<Memory>]) -> io::Result<()> {
        let vring =
            vrings.get(usize::from(index)).ok_or_else(|| io::Error::other("event of no queue"))?;
        if !self.event_idx.load(Ordering::Relaxed) {
            return self.serve_available(vring);
        }
        // With the event index, what becomes available while notifications are off must be looked
        // for once they are on again.
        loop {
            vring.disable_notification().map_err(io::Error::other)?;
            self.serve_available(vring)?;
            if !vring.enable_notification().map_err(io::Error::other)? {
                return Ok(());
            }
        }
    }
}

thread_local! {
    static OWN_ATTRIBUTES: Cell<bool> = const { Cell::new(false) };
}

/// Gives the calling thread its own mode mask and working directory, once.
fn own_file_system_attributes() -> io::Result<()> {
    if OWN_ATTRIBUTES.get() {
        return Ok(());
    }
    // SAFETY: no file descriptor table is unshared.
    unsafe { unshare_unsafe(UnshareFlags::FS) }?;
    OWN_ATTRIBUTES.set(true);
    Ok(())
}
