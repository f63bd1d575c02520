//! The driver's side of a window.

use std::sync::{Arc, OnceLock};

use super::super::registers::{Register, device_status};
use super::super::{EventFd, MmioTransport};
use crate::GuestMemory;
use crate::transport::Backend;

/// A driver that does what it is told, right or wrong.
pub(super) struct Driver(pub MmioTransport, Arc<OnceLock<EventFd>>);

impl Driver {
    /// The driver of a new window, whose interrupt it has once that is connected.
    pub fn new(backend: Box<dyn Backend>, memory: GuestMemory) -> Self {
        let line = Arc::new(OnceLock::new());
        let connected = line.clone();
        let connect = move |_: &[EventFd], interrupt: &EventFd| {
            assert!(connected.set(interrupt.try_clone()?).is_ok(), "connected twice");
            Ok(())
        };
        Self(MmioTransport::new(backend, memory, Box::new(connect)).unwrap(), line)
    }

    /// Whether the machine knows of the device's interrupt.
    pub fn is_connected(&self) -> bool {
        self.1.get().is_some()
    }

    pub fn read(&mut self, register: Register) -> u32 {
        let mut data = [0; 4];
        self.0.read(register as u64, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, register: Register, value: u32) {
        self.0.write(register as u64, &value.to_le_bytes());
    }

    pub fn add_status(&mut self, bits: u32) {
        let status = self.read(Register::Status);
        self.write(Register::Status, status | bits);
    }

    pub fn offered_features(&mut self) -> u64 {
        self.write(Register::DeviceFeaturesSel, 0);
        let low = self.read(Register::DeviceFeatures);
        self.write(Register::DeviceFeaturesSel, 1);
        u64::from(low) | u64::from(self.read(Register::DeviceFeatures)) << 32
    }

    /// Resets the device and accepts `features`.
    pub fn initialise(&mut self, features: u64) {
        self.write(Register::Status, 0);
        self.add_status(device_status::ACKNOWLEDGE);
        self.add_status(device_status::DRIVER);
        self.write(Register::DriverFeaturesSel, 0);
        self.write(Register::DriverFeatures, features as u32);
        self.write(Register::DriverFeaturesSel, 1);
        self.write(Register::DriverFeatures, (features >> 32) as u32);
        self.add_status(device_status::FEATURES_OK);
    }

    pub fn set_up_queue(&mut self, index: u32, size: u32, addresses: [u64; 3]) {
        self.write(Register::QueueSel, index);
        self.write(Register::QueueNum, size);
        let [descriptors, available, used] = addresses;
        self.write(Register::QueueDescLow, descriptors as u32);
        self.write(Register::QueueDescHigh, (descriptors >> 32) as u32);
        self.write(Register::QueueDriverLow, available as u32);
        self.write(Register::QueueDriverHigh, (available >> 32) as u32);
        self.write(Register::QueueDeviceLow, used as u32);
        self.write(Register::QueueDeviceHigh, (used >> 32) as u32);
        self.write(Register::QueueReady, 1);
    }

    /// Waits as a guest would, and takes the interrupt.
    pub fn wait_for_interrupt(&self) {
        let eventfd = self.1.get().expect("not connected");
        while eventfd.read().is_err() {
            std::thread::yield_now();
        }
    }
}
