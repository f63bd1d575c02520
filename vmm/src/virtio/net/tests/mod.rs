//! The device on a real tap, with a driver of the tests' own.

mod hostile;
mod limits;
mod receiving;
mod sending;
#[path = "../../../../tests/tap/mod.rs"]
mod tap;

use std::num::NonZeroU64;
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress};

use self::tap::{DEADLINE, EXPERIMENTAL, Wire, frame};
use super::*;
use crate::GuestMemory;
use crate::config::RateConfig;
use crate::virtio::ring::Ring;
use crate::virtio::{Event, Queues, Used, VirtioDevice};

const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

/// Where the driver keeps what it sends, and its receive buffers.
const OUT: u64 = 0x10_000;
const IN: u64 = 0x80_000;

const HEADER: usize = 12;

const SETTINGS: Settings = Settings {
    mac: [2, 0, 0, 0, 0, 1],
    mtu: Some(1500),
    receive: RateConfig { bytes_per_second: None, packets_per_second: None, burst_bytes: None },
    transmit: RateConfig { bytes_per_second: None, packets_per_second: None, burst_bytes: None },
};

/// The feature bits.
mod bit {
    pub const CSUM: u64 = 1 << 0;
    pub const GUEST_CSUM: u64 = 1 << 1;
    pub const GUEST_TSO4: u64 = 1 << 7;
    pub const HOST_TSO4: u64 = 1 << 11;
    pub const MRG_RXBUF: u64 = 1 << 15;
}

fn memory() -> GuestMemory {
    crate::memory::allocate(2).expect("memory")
}

/// A driver and its device.
struct Guest<'m> {
    memory: &'m GuestMemory,
    device: Net,
    receive: Ring<'m>,
    transmit: Ring<'m>,
}

impl<'m> Guest<'m> {
    fn new(memory: &'m GuestMemory, tap: OwnedFd, features: u64) -> Self {
        Self::with(memory, tap, features, SETTINGS)
    }

    fn with(memory: &'m GuestMemory, tap: OwnedFd, features: u64, settings: Settings) -> Self {
        let mut device = Net::new(tap, settings).expect("device");
        device.ack_features(features);
        let (receive, transmit) = (Ring::new(memory, 0, 16), Ring::new(memory, 0x4000, 16));
        Self { memory, device, receive, transmit }
    }

    fn process(&mut self, event: Event) -> Used {
        let mut queues = [&mut self.receive.queue, &mut self.transmit.queue];
        let mut queues = Queues { memory: self.memory, queues: &mut queues };
        self.device.process(event, &mut queues).expect("works")
    }

    /// Whether the device wants to be woken now.
    fn is_called(&self) -> bool {
        let events = self.device.host_events().expect("some");
        let mut fds = [PollFd::from_borrowed_fd(events, PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("polls") > 0
    }

    /// Wakes the device whenever it wants to be, until something holds.
    fn until(&mut self, what: &str, holds: impl Fn(&mut Self) -> bool) {
        let begin = Instant::now();
        while !holds(self) {
            assert!(begin.elapsed() < DEADLINE, "{what}");
            let events = self.device.host_events().expect("some");
            let mut fds = [PollFd::from_borrowed_fd(events, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 1, tv_nsec: 0 })).expect("polls");
            self.process(Event::Host);
        }
    }

    /// Offers a frame with a header, cut into pieces of at most `piece` bytes.
    fn send(&mut self, header: [u8; HEADER], frame: &[u8], piece: usize) {
        let bytes = [&header[..], frame].concat();
        self.memory.write_slice(&bytes, GuestAddress(OUT)).expect("in memory");
        let pieces: Vec<_> = (0..bytes.len())
            .step_by(piece)
            .map(|at| (OUT + at as u64, piece.min(bytes.len() - at) as u32, false))
            .collect();
        self.transmit.offer(&pieces);
        self.process(Event::Queue(TRANSMIT));
    }

    /// Makes `count` receive buffers of `length` bytes available, one after the other in memory from
    /// the place of the `first` on.
    fn offer(&mut self, first: u64, count: u64, length: u32) {
        for index in first..first + count {
            self.receive.offer(&[(IN + index * u64::from(length), length, true)]);
        }
        self.process(Event::Queue(RECEIVE));
    }

    fn bytes(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(address)).expect("in memory");
        bytes
    }
}

/// A header: flags, kind and size of segments, and where the checksum goes.
fn header(flags: u8, gso_type: u8, size: u16, start: u16, offset: u16) -> [u8; HEADER] {
    let [size, start, offset] = [size, start, offset].map(u16::to_le_bytes);
    [flags, gso_type, 0, 0, size[0], size[1], start[0], start[1], offset[0], offset[1], 0, 0]
}

#[test]
fn what_is_no_tap_or_no_setting_is_refused() {
    let tap = tap::in_a_new_namespace(1500);
    let refused = |tap: OwnedFd, settings: Settings| {
        Net::new(tap, settings).expect_err("refused").to_string()
    };
    let file = OwnedFd::from(tempfile::tempfile().expect("file"));
    assert!(refused(file, SETTINGS).contains("IFF_VNET_HDR"));
    let other = |settings| refused(tap.try_clone().expect("clones"), settings);
    for mac in [[1, 0, 0, 0, 0, 1], [0; 6], [0xff; 6]] {
        assert!(other(Settings { mac, ..SETTINGS }).contains("mac"));
    }
    assert!(other(Settings { mtu: Some(67), ..SETTINGS }).contains("mtu 67"));
}

#[test]
fn the_driver_is_told_what_the_settings_say() {
    let tap = tap::in_a_new_namespace(1500);
    let device = Net::new(tap.try_clone().expect("clones"), SETTINGS).expect("device");
    let mut space = [0xff; 14];
    device.read_config(0, &mut space);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 1, 0, 1, 0, 0xdc, 5, 0, 0]);
    let mtu = 1 << 3;
    assert_eq!(device.features() & mtu, mtu);
    let device = Net::new(tap, Settings { mtu: None, ..SETTINGS }).expect("device");
    assert_eq!(device.features() & mtu, 0);
    let others = bit::CSUM | bit::GUEST_CSUM | bit::GUEST_TSO4 | bit::HOST_TSO4 | bit::MRG_RXBUF;
    assert_eq!(device.features() & others, others);
}

#[test]
fn an_interface_that_is_removed_is_a_cable_that_was_pulled() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), bit::MRG_RXBUF);
    guest.offer(0, 4, 2048);
    tap::ip("link del tap0");
    guest.until("the device sees it", |guest| !guest.is_called());
    guest.send([0; HEADER], &frame(100, 1), 4096);
    assert_eq!(guest.transmit.used_count(), 1);
    assert_eq!(guest.device.counts(), Counts { send_dropped: 1, ..Counts::default() });
    assert!(!guest.is_called());
}

#[test]
fn a_reset_device_leaves_the_tap_alone() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), bit::MRG_RXBUF);
    let wire = Wire::of(EXPERIMENTAL);
    guest.offer(0, 1, 2048);
    guest.device.reset();
    wire.send(&frame(100, 1));
    assert!(!guest.is_called());

    guest.receive = Ring::new(&memory, 0, 16);
    memory.write_slice(&[0; 0x3000], GuestAddress(0)).expect("in memory");
    guest.device.ack_features(bit::MRG_RXBUF);
    guest.offer(0, 4, 2048);
    guest.until("the frame arrives", |guest| guest.receive.used_count() == 1);
    assert!(guest.bytes(IN + HEADER as u64, 100) == frame(100, 1));
}
