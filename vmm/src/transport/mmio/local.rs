//! A device of this process behind a virtio-mmio transport.

use std::sync::{Arc, Mutex};

use event_manager::SubscriberId;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::worker::{Served, Shareable, WorkerHandle};
use crate::log_limit::LogLimit;
use crate::sync::lock;
use crate::transport::{ActivateError, Activation, Backend};
use crate::virtio::VirtioDevice;

/// The features of transport and ring.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// A device that a [`Worker`](super::Worker)'s thread serves. That thread also starts and resets it: the
/// thread of the processor that asks for that may do little.
pub struct LocalBackend {
    device: Shareable,
    queue_max_sizes: Vec<u16>,
    worker: WorkerHandle,
    served: Option<SubscriberId>,
    breaks: Arc<LogLimit>,
}

impl LocalBackend {
    /// A device, to be served by `worker` once its driver is ready.
    pub fn new(device: Box<dyn VirtioDevice>, worker: WorkerHandle) -> Self {
        let queue_max_sizes = device.queue_max_sizes().to_vec();
        let (device, breaks) = (Arc::new(Mutex::new(device)), Arc::default());
        Self { device, queue_max_sizes, worker, served: None, breaks }
    }
}

impl Backend for LocalBackend {
    fn device_type(&self) -> u32 {
        lock(&self.device).device_type()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_max_sizes
    }

    fn features(&self) -> u64 {
        lock(&self.device).features() | TRANSPORT_FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        lock(&self.device).read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        lock(&self.device).write_config(offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let served = Served::new(self.device.clone(), activation, self.breaks.clone());
        let id = self.worker.serve(served).map_err(|source| ActivateError::Host {
            what: "hand the queues to the device's thread",
            source,
        })?;
        self.served = Some(id);
        Ok(())
    }

    fn reset(&mut self) {
        self.worker.release(self.served.take(), self.device.clone());
    }
}
