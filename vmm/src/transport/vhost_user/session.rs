//! A device and what the front-end has told of it.

use std::os::fd::{AsFd, OwnedFd};

use vhost::vhost_user::{Error, Result};
use virtio_queue::{Queue, QueueT};

use super::memory::MemoryTable;
use super::vring::Vring;
use crate::log_limit::LogLimit;
use crate::virtio::{Event, Queues, Used, VirtioDevice};

/// The size that every queue may have, whatever its device asks for: QEMU's virtio-mmio offers the
/// driver this many entries, for any device.
const QEMU_QUEUE_SIZE: u16 = 1024;

/// A device being served.
pub(super) struct Session {
    pub(super) device: Box<dyn VirtioDevice>,
    epoll: OwnedFd,
    table: MemoryTable,
    vrings: Vec<Vring>,
    /// The device has failed and waits for a reset.
    failed: bool,
    failures: LogLimit,
    /// The front-end has enabled rings before it has set features.
    enabled_early: bool,
}

impl Session {
    /// Serves `device`; the doorbells are watched by `epoll`, under the numbers of their queues.
    pub(super) fn new(device: Box<dyn VirtioDevice>, epoll: OwnedFd) -> Result<Self> {
        let sizes = device.queue_max_sizes().iter();
        let vrings =
            (0..).zip(sizes).map(|(index, size)| Vring::new(index, (*size).max(QEMU_QUEUE_SIZE)));
        let vrings = vrings.collect::<Result<_>>()?;
        let table = MemoryTable::empty();
        let failures = LogLimit::new();
        Ok(Self { device, epoll, table, vrings, failed: false, failures, enabled_early: false })
    }

    /// A doorbell rings.
    pub(super) fn on_kick(&mut self, index: u16) {
        let Some(vring) = self.vrings.get_mut(usize::from(index)) else { return };
        if !vring.is_served() {
            return;
        }
        if let Err(error) = vring.clear_kick() {
            tracing::warn!(%error, queue = index, "doorbell can't be read, queue stopped");
            vring.end(self.epoll.as_fd());
            return;
        }
        self.process(Event::Queue(index));
    }

    /// The host has work for the device. Also while no queue is served: they are then not ready.
    pub(super) fn on_host(&mut self) {
        self.process(Event::Host);
    }

    /// Stops everything: nothing of the front-end is touched any more.
    pub(super) fn disconnect(&mut self) {
        self.reset();
        self.table = MemoryTable::empty();
    }

    /// Stops every queue and resets the device.
    pub(super) fn reset(&mut self) {
        for vring in &mut self.vrings {
            vring.end(self.epoll.as_fd());
            vring.set_kick(None);
            vring.set_call(None);
            vring.set_error(None);
            vring.set_enabled(false);
        }
        self.device.reset();
        self.failed = false;
    }

    /// QEMU enables a network device's rings before anything else, all of them, one after the other,
    /// and not again when it has set features.
    pub(super) fn enable_early(&mut self) {
        self.enabled_early = true;
    }

    /// Whether rings are enabled as soon as features are set.
    pub(super) fn is_enabled_early(&self) -> bool {
        self.enabled_early
    }

    pub(super) fn queue_count(&self) -> u32 {
        // Lossless: a device has a handful of queues.
        self.vrings.len() as u32
    }

    pub(super) fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    /// A queue whose set-up may be changed, because it isn't served, and the memory it will lie in.
    pub(super) fn stopped_vring(&mut self, index: u32) -> Result<(&mut Vring, &MemoryTable)> {
        let vring = self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        if vring.is_served() {
            return Err(Error::InvalidOperation("the ring is being served"));
        }
        Ok((vring, &self.table))
    }

    pub(super) fn set_event_idx(&mut self, enabled: bool) {
        for vring in &mut self.vrings {
            vring.queue.set_event_idx(enabled);
        }
    }

    /// Replaces guest memory. A queue that does not lie in it can't be served on.
    pub(super) fn set_memory(&mut self, table: MemoryTable) {
        self.table = table;
        for vring in &mut self.vrings {
            if vring.is_served() && !vring.queue.is_valid(self.table.memory()) {
                vring.end(self.epoll.as_fd());
            }
        }
    }

    /// Brings a queue into the state that the front-end wants it in.
    pub(super) fn update(&mut self, index: u32) -> Result<()> {
        let vring = self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        if !vring.is_wanted() {
            return self.stop(index);
        }
        if vring.is_served() || self.failed {
            return Ok(());
        }
        vring.begin(self.table.memory(), self.epoll.as_fd())?;
        // Lossless: there is such a queue.
        self.process(Event::Queue(index as u16));
        Ok(())
    }

    /// Stops a queue, and resets the device if it was the last.
    pub(super) fn stop(&mut self, index: u32) -> Result<()> {
        let vring = self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        let was_served = vring.is_served();
        vring.end(self.epoll.as_fd());
        if (was_served || self.failed) && !self.vrings.iter().any(Vring::is_served) {
            self.device.reset();
            self.failed = false;
        }
        Ok(())
    }

    /// Stops watching a queue's doorbell, to take another.
    pub(super) fn detach_kick(&mut self, index: u32) -> Result<&mut Vring> {
        let vring = self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)?;
        vring.end(self.epoll.as_fd());
        Ok(vring)
    }

    fn process(&mut self, event: Event) {
        if self.failed {
            return;
        }
        let mut queues: Vec<&mut Queue> =
            self.vrings.iter_mut().map(|vring| &mut vring.queue).collect();
        let mut queues = Queues { memory: self.table.memory(), queues: &mut queues };
        match self.device.process(event, &mut queues) {
            Ok(used) => self.interrupt(used),
            Err(error) => {
                if let Some(count) = self.failures.admit() {
                    let error: &dyn std::error::Error = &error;
                    let device = self.device.device_type();
                    tracing::error!(
                        error,
                        device,
                        count,
                        "device stopped until its driver resets it"
                    );
                }
                self.failed = true;
                for vring in &mut self.vrings {
                    vring.report_error();
                    vring.end(self.epoll.as_fd());
                }
            }
        }
    }

    fn interrupt(&mut self, used: Used) {
        for (index, vring) in (0..).zip(&mut self.vrings) {
            if used.contains(index) && vring.is_served() {
                vring.interrupt(self.table.memory());
            }
        }
    }
}
