//! A driver's half of virtio-mmio (virtio 1.2, sections 3.1 and 4.2).

#![allow(dead_code, reason = "no guest needs all of this")]

pub mod queue;

use core::fmt;

use crate::rt::{apic, cmdline, time, trap};
use queue::{Queue, Ring};

pub const MAGIC: u64 = 0x000;
pub const VERSION: u64 = 0x004;
pub const DEVICE_ID: u64 = 0x008;
const DEVICE_FEATURES: u64 = 0x010;
pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
pub const DRIVER_FEATURES: u64 = 0x020;
pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
pub const QUEUE_SELECT: u64 = 0x030;
pub const QUEUE_SIZE_MAX: u64 = 0x034;
pub const QUEUE_SIZE: u64 = 0x038;
pub const QUEUE_READY: u64 = 0x044;
pub const QUEUE_NOTIFY: u64 = 0x050;
pub const INTERRUPT_STATUS: u64 = 0x060;
pub const INTERRUPT_ACK: u64 = 0x064;
pub const STATUS: u64 = 0x070;
pub const QUEUE_DESCRIPTORS: u64 = 0x080;
const QUEUE_DRIVER: u64 = 0x090;
const QUEUE_DEVICE: u64 = 0x0a0;
pub const CONFIG: u64 = 0x100;

pub const ACKNOWLEDGE: u32 = 1;
pub const DRIVER: u32 = 2;
pub const DRIVER_OK: u32 = 4;
pub const FEATURES_OK: u32 = 8;
pub const NEEDS_RESET: u32 = 64;

/// The feature that every device of this century has.
pub const VERSION_1: u64 = 1 << 32;

/// The first interrupt vector of devices: their line is added.
const FIRST_VECTOR: u8 = 0x90;

/// Where a device's registers are, and its interrupt line.
#[derive(Clone, Copy)]
pub struct Window {
    pub base: u64,
    pub size: u64,
    pub line: u8,
}

/// The windows that the kernel command line names: `virtio_mmio.device=SIZE@BASE:LINE[:ID]`.
pub fn windows() -> impl Iterator<Item = Window> {
    cmdline::values("virtio_mmio.device").filter_map(|value| {
        let (size, place) = value.split_once('@')?;
        let mut place = place.split(':');
        Some(Window {
            base: cmdline::parse_size(place.next()?)?,
            size: cmdline::parse_size(size)?,
            line: place.next()?.parse().ok()?,
        })
    })
}

/// The windows with a device of this kind behind them.
pub fn find(device_id: u32) -> impl Iterator<Item = Window> {
    windows().filter(move |window| window.read(DEVICE_ID) == device_id)
}

impl Window {
    /// Reads a register.
    pub fn read(&self, register: u64) -> u32 {
        // SAFETY: the machine says that a device's registers are there.
        unsafe { ((self.base + register) as *const u32).read_volatile() }
    }

    /// Writes a register.
    pub fn write(&self, register: u64, value: u32) {
        // SAFETY: as above.
        unsafe { ((self.base + register) as *mut u32).write_volatile(value) }
    }

    /// All features that the device offers.
    pub fn features(&self) -> u64 {
        self.write(DEVICE_FEATURES_SELECT, 0);
        let low = self.read(DEVICE_FEATURES);
        self.write(DEVICE_FEATURES_SELECT, 1);
        u64::from(self.read(DEVICE_FEATURES)) << 32 | u64::from(low)
    }

    /// Accepts features. Whether the device agrees.
    pub fn accept(&self, features: u64) -> bool {
        self.write(DRIVER_FEATURES_SELECT, 0);
        self.write(DRIVER_FEATURES, features as u32);
        self.write(DRIVER_FEATURES_SELECT, 1);
        self.write(DRIVER_FEATURES, (features >> 32) as u32);
        self.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.read(STATUS) & FEATURES_OK != 0
    }

    /// Sets a queue up. Whether the device takes it.
    pub fn set_queue(&self, index: u32, size: u32, places: [u64; 3]) -> bool {
        self.write(QUEUE_SELECT, index);
        self.write(QUEUE_SIZE, size);
        for (register, address) in [QUEUE_DESCRIPTORS, QUEUE_DRIVER, QUEUE_DEVICE].iter().zip(places)
        {
            self.write(*register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(QUEUE_READY, 1);
        self.read(QUEUE_READY) == 1
    }

    /// Resets the device and waits until it says so.
    pub fn reset(&self) -> bool {
        self.write(STATUS, 0);
        time::wait_until(|| self.read(STATUS) == 0)
    }
}

/// Why a device cannot be used.
#[derive(Clone, Copy)]
pub enum Error {
    Reset,
    Features,
    QueueTaken(u32),
    QueueTooSmall(u32),
    QueueRefused(u32),
    Broken,
    NoInterrupt,
}

impl fmt::Display for Error {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Reset => write!(to, "it does not reset"),
            Self::Features => write!(to, "it refuses the features that it offers"),
            Self::QueueTaken(index) => write!(to, "queue {index} is ready after a reset"),
            Self::QueueTooSmall(index) => write!(to, "queue {index} is too small"),
            Self::QueueRefused(index) => write!(to, "queue {index} is refused"),
            Self::Broken => write!(to, "it needs a reset"),
            Self::NoInterrupt => write!(to, "no interrupt came"),
        }
    }
}

/// A device that this driver owns.
pub struct Device {
    window: Window,
    /// The features agreed on.
    pub features: u64,
    interrupts_seen: u64,
}

impl Device {
    /// Takes a device over, with those of `wanted` that it offers.
    pub fn open(window: Window, wanted: u64) -> Result<Self, Error> {
        if !window.reset() {
            return Err(Error::Reset);
        }
        window.write(STATUS, ACKNOWLEDGE);
        window.write(STATUS, ACKNOWLEDGE | DRIVER);
        let features = window.features() & (wanted | VERSION_1);
        if !window.accept(features) {
            return Err(Error::Features);
        }
        apic::route(window.line, FIRST_VECTOR + window.line);
        let interrupts_seen = trap::interrupts(FIRST_VECTOR + window.line);
        Ok(Self { window, features, interrupts_seen })
    }

    /// Gives the device a queue.
    pub fn add_queue(&self, index: u32, ring: &'static mut Ring) -> Result<Queue, Error> {
        let window = &self.window;
        window.write(QUEUE_SELECT, index);
        if window.read(QUEUE_READY) != 0 {
            return Err(Error::QueueTaken(index));
        }
        if window.read(QUEUE_SIZE_MAX) < u32::from(queue::SIZE) {
            return Err(Error::QueueTooSmall(index));
        }
        match window.set_queue(index, queue::SIZE.into(), ring.addresses()) {
            true => Ok(Queue::new(ring)),
            false => Err(Error::QueueRefused(index)),
        }
    }

    /// Tells the device that its queues are set up.
    pub fn begin(&self) -> Result<(), Error> {
        self.window.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        match self.window.read(STATUS) & NEEDS_RESET {
            0 => Ok(()),
            _ => Err(Error::Broken),
        }
    }

    /// Rings the doorbell of a queue.
    pub fn notify(&self, queue: u32) {
        self.window.write(QUEUE_NOTIFY, queue);
    }

    /// Waits for an interrupt that this was not yet called for, and acknowledges it.
    pub fn wait(&mut self) -> Result<(), Error> {
        let vector = FIRST_VECTOR + self.window.line;
        if !time::wait_until(|| trap::interrupts(vector) != self.interrupts_seen) {
            return Err(match self.window.read(STATUS) & NEEDS_RESET {
                0 => Error::NoInterrupt,
                _ => Error::Broken,
            });
        }
        self.interrupts_seen = trap::interrupts(vector);
        self.window.write(INTERRUPT_ACK, self.window.read(INTERRUPT_STATUS));
        Ok(())
    }

    /// Whether the device has given up.
    pub fn needs_reset(&self) -> bool {
        self.window.read(STATUS) & NEEDS_RESET != 0
    }

    /// Eight bytes of the configuration space.
    pub fn config64(&self, offset: u64) -> u64 {
        let low = self.window.read(CONFIG + offset);
        u64::from(self.window.read(CONFIG + offset + 4)) << 32 | u64::from(low)
    }

    /// Takes the device out of service.
    pub fn reset(self) -> bool {
        self.window.reset()
    }
}
