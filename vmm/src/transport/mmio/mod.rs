//! The virtio-mmio transport (virtio 1.2, section 4.2), version 2 registers.
//!
//! A [`MmioTransport`] is one device's window: it answers the driver's register accesses, keeps the
//! device status state machine, checks what the driver negotiates and where it puts its queues, and
//! hands the queues to a [`Backend`] when the driver is ready. Then it is out of the way: doorbells
//! and interrupts are eventfds.
//!
//! # What a driver can rely on
//! * `VERSION_1` is mandatory: without it `FEATURES_OK` does not stick. So it is with a feature that
//!   was not offered.
//! * A reset (writing 0 to `Status`) returns when nothing touches the queues any more.
//! * `DEVICE_NEEDS_RESET` comes with a configuration interrupt.
//!
//! # What is refused
//! Features outside of negotiation, queues outside of set-up, a queue whose parts are not wholly in
//! memory or not aligned (`QueueReady` stays 0), accesses of other widths than the registers have:
//! they have no effect, and the first of them are logged.

mod local;
mod queue_setup;
mod registers;
mod worker;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::queue_setup::QueueSetup;
use self::registers::{CONFIGURATION, Register, device_status};
use super::{Activation, Backend, Interrupt};
use crate::GuestMemory;
use crate::log_limit::LogLimit;

pub use self::local::LocalBackend;
pub use self::worker::{Worker, WorkerHandle};

/// Offset of the `QueueNotify` register, for ioeventfds.
pub const QUEUE_NOTIFY: u64 = Register::QueueNotify as u64;

/// `InterruptStatus`: the device has used a buffer.
const INTERRUPT_USED: u32 = 1 << 0;
/// `InterruptStatus`: the device's configuration has changed.
const INTERRUPT_CONFIG: u32 = 1 << 1;

/// Connects a window's doorbells, by queue index, and its interrupt to the machine.
pub type Connect = Box<dyn FnOnce(&[EventFd], &EventFd) -> std::io::Result<()> + Send>;

/// A virtio device's window.
pub struct MmioTransport {
    backend: Box<dyn Backend>,
    memory: GuestMemory,
    queues: Vec<QueueSetup>,
    doorbells: Vec<EventFd>,
    interrupt: Interrupt,
    /// Until they are connected.
    connect: Option<Connect>,
    status: u32,
    driver_features: u64,
    /// Which half of the offered features `DeviceFeatures` shows.
    device_features_select: u32,
    /// Which half of the accepted features `DriverFeatures` writes.
    driver_features_select: u32,
    queue_select: u32,
    config_generation: u32,
    breaches: LogLimit,
}

impl MmioTransport {
    /// Makes the window of `backend`. Its eventfds are connected by `connect` when a driver first
    /// starts the device: what no driver uses costs the machine nothing. Until then a doorbell is a
    /// [write](Self::write) like any other.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(
        backend: Box<dyn Backend>,
        memory: GuestMemory,
        connect: Connect,
    ) -> std::io::Result<Self> {
        let eventfd = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC);
        let sizes = backend.queue_max_sizes();
        let queues = sizes.iter().map(|max| QueueSetup::new(*max)).collect();
        let doorbells = sizes.iter().map(|_| eventfd()).collect::<Result<_, _>>()?;
        let interrupt = Interrupt {
            status: Arc::new(AtomicU32::new(0)),
            eventfd: Arc::new(eventfd()?),
            needs_reset: Arc::new(AtomicBool::new(false)),
        };
        Ok(Self {
            backend,
            memory,
            queues,
            doorbells,
            interrupt,
            connect: Some(connect),
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
            config_generation: 0,
            breaches: LogLimit::new(),
        })
    }

    /// Serves a read at `offset` in the window.
    pub fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let Some(offset) = offset.checked_sub(CONFIGURATION) {
            return self.backend.read_config(offset, data);
        }
        data.fill(0);
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else {
            return self.breach("a register read of another width than 4 bytes");
        };
        if let Some(register) = Register::at(offset) {
            *data = self.read_register(register).to_le_bytes();
        }
    }

    /// Serves a write at `offset` in the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(CONFIGURATION) {
            self.config_generation = self.config_generation.wrapping_add(1);
            return self.backend.write_config(offset, data);
        }
        let Ok(value) = <[u8; 4]>::try_from(data) else {
            return self.breach("a register write of another width than 4 bytes");
        };
        if let Some(register) = Register::at(offset) {
            self.write_register(register, u32::from_le_bytes(value));
        }
    }

    fn read_register(&self, register: Register) -> u32 {
        match register {
            Register::MagicValue => u32::from_le_bytes(*b"virt"),
            Register::Version => 2,
            Register::DeviceId => self.backend.device_type(),
            Register::VendorId => u32::from_le_bytes(*b"kiln"),
            Register::DeviceFeatures => half(self.backend.features(), self.device_features_select),
            Register::QueueNumMax => self.selected().map_or(0, |q| q.max_size().into()),
            Register::QueueReady => self.selected().map_or(0, |q| q.is_ready().into()),
            Register::InterruptStatus => self.interrupt_status(),
            Register::Status => self.device_status(),
            Register::ConfigGeneration => self.config_generation,
            // There are no shared memory regions: length and address of any read as all-ones.
            Register::ShmLenLow
            | Register::ShmLenHigh
            | Register::ShmBaseLow
            | Register::ShmBaseHigh => u32::MAX,
            _ => 0,
        }
    }

    fn write_register(&mut self, register: Register, value: u32) {
        match register {
            Register::DeviceFeaturesSel => self.device_features_select = value,
            Register::DriverFeaturesSel => self.driver_features_select = value,
            Register::DriverFeatures => self.accept_features(value),
            Register::QueueSel => self.queue_select = value,
            Register::QueueNotify => self.ring(value),
            Register::InterruptAck => {
                self.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            Register::Status => self.set_status(value),
            Register::QueueNum => self.set_up_queue(|queue| queue.size = value),
            Register::QueueDescLow => self.set_up_queue(|q| set_low(&mut q.descriptors, value)),
            Register::QueueDescHigh => self.set_up_queue(|q| set_high(&mut q.descriptors, value)),
            Register::QueueDriverLow => self.set_up_queue(|q| set_low(&mut q.available, value)),
            Register::QueueDriverHigh => self.set_up_queue(|q| set_high(&mut q.available, value)),
            Register::QueueDeviceLow => self.set_up_queue(|q| set_low(&mut q.used, value)),
            Register::QueueDeviceHigh => self.set_up_queue(|q| set_high(&mut q.used, value)),
            Register::QueueReady => self.set_queue_ready(value),
            _ => {}
        }
    }

    fn selected(&self) -> Option<&QueueSetup> {
        self.queues.get(usize::try_from(self.queue_select).ok()?)
    }

    /// Between `FEATURES_OK` and `DRIVER_OK` queues are set up.
    fn is_setting_up(&self) -> bool {
        let phase = device_status::FEATURES_OK | device_status::DRIVER_OK;
        self.status & phase == device_status::FEATURES_OK
    }

    fn set_up_queue(&mut self, set: impl FnOnce(&mut QueueSetup)) {
        if !self.is_setting_up() {
            return self.breach("a queue register written outside of set-up");
        }
        let index = self.queue_select as usize;
        match self.queues.get_mut(index).filter(|queue| !queue.is_ready()) {
            Some(queue) => set(queue),
            None => self.breach("a register of a queue that is ready or isn't there written"),
        }
    }

    fn set_queue_ready(&mut self, value: u32) {
        let index = self.queue_select as usize;
        if !self.is_setting_up() || index >= self.queues.len() {
            return self.breach("QueueReady written outside of set-up");
        }
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let queue = &mut self.queues[index];
        if value != 1 {
            queue.withdraw();
        } else if let Err(e) = queue.make_ready(&self.memory, event_idx) {
            self.breach(&format!("queue {index} refused: {e}"));
        }
    }

    fn accept_features(&mut self, value: u32) {
        let phase = device_status::DRIVER | device_status::FEATURES_OK;
        if self.status & phase != device_status::DRIVER {
            return self.breach("features accepted outside of negotiation");
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Whether the accepted features are ones that a driver may accept.
    fn features_are_acceptable(&self) -> bool {
        let offered = self.backend.features();
        let modern = self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0;
        modern && self.driver_features & !offered == 0
    }

    fn device_status(&self) -> u32 {
        match self.interrupt.needs_reset.load(Ordering::SeqCst) {
            true => self.status | device_status::NEEDS_RESET,
            false => self.status,
        }
    }

    fn interrupt_status(&self) -> u32 {
        let status = self.interrupt.status.load(Ordering::SeqCst);
        // Only the process that serves the queues knows, and it can't set the bit here.
        let elsewhere = self.backend.is_remote() && self.is_active();
        if elsewhere { status | INTERRUPT_USED } else { status }
    }

    fn is_active(&self) -> bool {
        self.status & device_status::DRIVER_OK != 0
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        if value & self.status != self.status {
            return self.breach("a status bit cleared other than by a reset");
        }
        let new = value & !self.status & device_status::WRITABLE;
        for bit in device_status::IN_ORDER.into_iter().filter(|bit| new & bit.value != 0) {
            if self.status & bit.requires != bit.requires {
                return self.breach("a status bit set before those it depends on");
            }
            if bit.value == device_status::FEATURES_OK && !self.features_are_acceptable() {
                return self.breach("features accepted that cannot be");
            }
            self.status |= bit.value;
            if bit.value == device_status::DRIVER_OK {
                self.activate();
            }
        }
        self.status |= new & device_status::FAILED;
    }

    fn activate(&mut self) {
        let result = self
            .connect()
            .and_then(|()| self.activation())
            .and_then(|activation| self.backend.activate(activation));
        let Err(e) = result else { return };
        if let Some(count) = self.breaches.admit() {
            let device = self.backend.device_type();
            tracing::error!(device, count, "virtio device not started: {e}");
        }
        self.interrupt.demand_reset();
    }

    fn connect(&mut self) -> Result<(), super::ActivateError> {
        let Some(connect) = self.connect.take() else { return Ok(()) };
        connect(&self.doorbells, &self.interrupt.eventfd).map_err(|source| {
            super::ActivateError::Host { what: "connect the doorbells and the interrupt", source }
        })
    }

    fn activation(&mut self) -> Result<Activation, super::ActivateError> {
        let clones = self.doorbells.iter().map(EventFd::try_clone).collect::<Result<_, _>>();
        let doorbells = clones
            .map_err(|source| super::ActivateError::Host { what: "clone a doorbell", source })?;
        Ok(Activation {
            memory: self.memory.clone(),
            features: self.driver_features,
            queues: self.queues.iter_mut().map(QueueSetup::take).collect(),
            doorbells,
            interrupt: self.interrupt.clone(),
        })
    }

    fn reset(&mut self) {
        if self.is_active() {
            self.backend.reset();
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.queues.iter_mut().for_each(QueueSetup::reset);
        self.interrupt.needs_reset.store(false, Ordering::SeqCst);
        self.interrupt.status.store(0, Ordering::SeqCst);
    }

    /// A doorbell that no ioeventfd caught.
    fn ring(&mut self, index: u32) {
        match self.doorbells.get(index as usize) {
            Some(doorbell) => {
                // The only failure is a counter at its limit, which wakes just as well.
                let _ = doorbell.write(1);
            }
            None => self.breach("the doorbell of a queue that isn't there rung"),
        }
    }

    fn breach(&self, what: &str) {
        if let Some(count) = self.breaches.admit() {
            tracing::warn!(device = self.backend.device_type(), count, "virtio driver: {what}");
        }
    }
}

impl Interrupt {
    /// Tells the driver that buffers were used.
    pub(super) fn used(&self) {
        self.raise(INTERRUPT_USED);
    }

    /// Tells the driver that the device can't go on until it is reset.
    pub(super) fn demand_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn raise(&self, cause: u32) {
        self.status.fetch_or(cause, Ordering::SeqCst);
        // The only failure is a counter at its limit, which interrupts just as well.
        let _ = self.eventfd.write(1);
    }
}

/// A 32-bit half of `value`; halves past the second are zero.
fn half(value: u64, select: u32) -> u32 {
    match select {
        0 => value as u32,
        1 => (value >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value & !0xffff_ffff | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = *value & 0xffff_ffff | u64::from(high) << 32;
}

#[cfg(test)]
mod tests;
