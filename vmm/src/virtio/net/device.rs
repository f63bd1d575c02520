//! The device: its queues and its life.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_queue::QueueT;

use super::features;
use super::receive::Receiver;
use super::tap::{NewError, Tap};
use super::transmit::Transmitter;
use super::wake::{Wait, Wake};
use crate::config::RateConfig;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// The queues' numbers.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const QUEUE_SIZES: [u16; 2] = [256, 256];

/// The least MTU that IPv4 works with (RFC 791).
const MIN_MTU: u16 = 68;

/// What a network device is to be.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Its address.
    pub mac: [u8; 6],
    /// The MTU that its driver is told, at least 68.
    pub mtu: Option<u16>,
    /// What the guest may receive.
    pub receive: RateConfig,
    /// What the guest may send.
    pub transmit: RateConfig,
}

/// How many frames there were in the device's life.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Frames that the guest got.
    pub received: u64,
    /// Frames for the guest that were dropped.
    pub receive_dropped: u64,
    /// Frames that the tap got.
    pub sent: u64,
    /// Frames of the guest that were dropped.
    pub send_dropped: u64,
}

/// A network device.
#[derive(Debug)]
pub struct Net {
    mac: [u8; 6],
    mtu: Option<u16>,
    tap: Tap,
    wake: Wake,
    /// What the driver accepted.
    features: u64,
    receiver: Receiver,
    transmitter: Transmitter,
    /// What each direction waits for.
    receive_wait: Wait,
    transmit_wait: Wait,
}

impl Net {
    /// A device on a tap, attached with `IFF_TAP`, `IFF_NO_PI` and `IFF_VNET_HDR`.
    ///
    /// # Errors
    /// Settings that can't be, or a descriptor that is no such tap.
    pub fn new(tap: OwnedFd, settings: Settings) -> Result<Self, NewError> {
        let Settings { mac, mtu, receive, transmit } = settings;
        if mac[0] & 1 != 0 || mac == [0; 6] {
            return Err(NewError::Mac(mac));
        }
        if let Some(mtu) = mtu.filter(|mtu| *mtu < MIN_MTU) {
            return Err(NewError::Mtu(mtu));
        }
        Ok(Self {
            mac,
            mtu,
            tap: Tap::new(tap)?,
            wake: Wake::new().map_err(NewError::host("make an epoll instance"))?,
            features: 0,
            receiver: Receiver::new(receive),
            transmitter: Transmitter::new(transmit),
            receive_wait: Wait::Driver,
            transmit_wait: Wait::Driver,
        })
    }

    /// How many frames there were.
    #[must_use]
    pub fn counts(&self) -> Counts {
        Counts {
            received: self.receiver.passed,
            receive_dropped: self.receiver.dropped,
            sent: self.transmitter.passed,
            send_dropped: self.transmitter.dropped,
        }
    }

    fn serve(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        if event == Event::Host {
            self.wake.calm();
        }
        let mut used = Used::NONE;
        let memory = queues.memory;
        let [receive, transmit, ..] = &mut *queues.queues else {
            return Ok(used);
        };
        let offloads = features::tap_offloads(self.features);
        if (receive.ready() || transmit.ready()) && self.tap.offloads() != offloads {
            let set = self.tap.set_offloads(offloads);
            set.map_err(|source| DeviceError::Host { what: "set the tap's offloads", source })?;
        }
        if !receive.ready() {
            self.receive_wait = Wait::Driver;
        } else if event != Event::Queue(TRANSMIT) {
            let done = self.receiver.run(&self.tap, self.features, memory, receive);
            let (any, wait) =
                done.map_err(|reason| DeviceError::Queue { queue: RECEIVE, reason })?;
            self.receive_wait = wait;
            if any {
                used.add(RECEIVE);
            }
        }
        if !transmit.ready() {
            self.transmit_wait = Wait::Driver;
        } else if event == Event::Queue(TRANSMIT)
            || event == Event::Host && self.transmit_wait != Wait::Driver
        {
            let done = self.transmitter.run(&self.tap, self.features, memory, transmit);
            let (any, wait) =
                done.map_err(|reason| DeviceError::Queue { queue: TRANSMIT, reason })?;
            self.transmit_wait = wait;
            if any {
                used.add(TRANSMIT);
            }
        }
        let arranged = self.wake.arrange(self.tap.as_fd(), self.receive_wait, self.transmit_wait);
        arranged.map_err(|source| DeviceError::Host { what: "watch the tap", source })?;
        Ok(used)
    }

    fn rest(&mut self) {
        self.receive_wait = Wait::Driver;
        self.transmit_wait = Wait::Driver;
        if let Err(error) = self.wake.rest(self.tap.as_fd()) {
            tracing::warn!("the tap can't be left alone: {error}");
        }
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::offered(self.mtu.is_some(), self.tap.has_uso())
    }

    fn ack_features(&mut self, features: u64) {
        self.features = features & self.features();
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&features::space(self.mac, self.mtu), offset, data);
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.wake.events())
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let served = self.serve(event, queues);
        if served.is_err() {
            self.rest();
        }
        served
    }

    fn reset(&mut self) {
        self.rest();
        self.receiver.reset();
        self.features = 0;
        // What comes from now on is for a driver that may accept less. The next activation sets
        // them anyway.
        if let Err(error) = self.tap.set_offloads(0) {
            tracing::warn!("the tap's offloads can't be reset: {error}");
        }
    }
}
