//! The device with its queues.

use std::io::{Read, Write};

use proptest::prelude::*;

use super::*;
use crate::virtio::chains::{check, hostile_queue};
use crate::virtio::ring::Ring;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::packet::HEADER_SIZE;
use crate::virtio::{Event, Queues, VirtioDevice};

/// Where the driver of these tests keeps its packets and buffers.
const PACKETS: u64 = 0x10_000;
const BUFFERS: u64 = 0x40_000;

#[test]
fn packets_pass_through_the_queues() {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x80_000)]).expect("memory");
    let (monitor, device_end) = Broker::pair().expect("broker");
    let mut device = Vsock::new(CID, &[1024], device_end).expect("device");
    let mut receive = Ring::new(&memory, 0, 16);
    let mut transmit = Ring::new(&memory, 0x4000, 16);
    let mut event = Ring::new(&memory, 0x8000, 16);

    // A buffer that is too small, then one in three pieces that cut the header.
    receive.offer(&[(BUFFERS, 44, true)]);
    receive.offer(&[(BUFFERS, 40, true), (BUFFERS + 40, 10, true), (BUFFERS + 50, 100, true)]);
    let request = header(Op::Request, 5, 1024).to_bytes();
    memory.write_slice(&request, GuestAddress(PACKETS)).expect("in memory");
    transmit.offer(&[(PACKETS, 30, false), (PACKETS + 30, 14, false)]);
    transmit.offer(&[(PACKETS, 43, false)]);

    let mut queues = [&mut receive.queue, &mut transmit.queue, &mut event.queue];
    let mut queues = Queues { memory: &memory, queues: &mut queues };
    let used = device.process(Event::Queue(1), &mut queues).expect("works");
    assert!(used.contains(0) && used.contains(1) && !used.contains(2));
    assert_eq!(transmit.used().len(), 2, "a packet that is cut short is dropped");
    assert_eq!(receive.used(), [(0, 0), (1, HEADER_SIZE as u32)]);
    let mut response = [0; HEADER_SIZE];
    memory.read_slice(&mut response, GuestAddress(BUFFERS)).expect("in memory");
    assert_eq!(Header::from_bytes(&response).op, Op::Response as u16);
    let (_, mut stream) = monitor.try_accept().expect("broker").expect("a connection");

    // Without buffers nothing is read from the host, and nothing is lost.
    stream.write_all(&[9; 150]).expect("writes");
    let mut queues = [&mut receive.queue, &mut transmit.queue, &mut event.queue];
    let mut queues = Queues { memory: &memory, queues: &mut queues };
    let used = device.process(Event::Host, &mut queues).expect("works");
    assert!(!used.contains(0));
    for _ in 0..3 {
        receive.offer(&[(BUFFERS, 144, true)]);
    }
    let mut queues = [&mut receive.queue, &mut transmit.queue, &mut event.queue];
    let mut queues = Queues { memory: &memory, queues: &mut queues };
    device.process(Event::Queue(0), &mut queues).expect("works");
    let lengths: Vec<_> = receive.used().iter().map(|(_, length)| *length).collect();
    assert_eq!(lengths[2..], [144, 94]);

    // A large write, spread over several descriptors.
    let mut packet = Header { len: 65_536, ..header(Op::Data, 5, 1024) }.to_bytes().to_vec();
    packet.extend((0..65_536u32).map(|at| (at / 5) as u8));
    memory.write_slice(&packet, GuestAddress(PACKETS)).expect("in memory");
    transmit.offer(&[
        (PACKETS, 44, false),
        (PACKETS + 44, 4096, false),
        (PACKETS + 4140, 32_768, false),
        (PACKETS + 36_908, 28_672, false),
    ]);
    let mut queues = [&mut receive.queue, &mut transmit.queue, &mut event.queue];
    let mut queues = Queues { memory: &memory, queues: &mut queues };
    device.process(Event::Queue(1), &mut queues).expect("works");
    let mut data = vec![0; 65_536];
    stream.set_nonblocking(false).expect("blocking");
    stream.read_exact(&mut data).expect("all of it");
    assert!(data == packet[HEADER_SIZE..]);
}

#[test]
fn configuration_is_the_context_id() {
    let (_monitor, device_end) = Broker::pair().expect("broker");
    let device = Vsock::new(0x0102_0304, &[], device_end).expect("device");
    let mut config = [0xff; 10];
    device.read_config(0, &mut config);
    assert_eq!(config, [4, 3, 2, 1, 0, 0, 0, 0, 0, 0]);
    for reserved in [0, 1, 2, u64::from(u32::MAX), 1 << 32] {
        let (_monitor, device_end) = Broker::pair().expect("broker");
        assert!(Vsock::new(reserved, &[], device_end).is_err(), "{reserved}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn hostile_chains_are_survived(
        queues in prop::collection::vec(hostile_queue(false), 3),
        indirect in prop::collection::vec(hostile_queue(true), 3),
    ) {
        let (monitor, device_end) = Broker::pair().expect("broker");
        let mut device = Vsock::new(CID, &[1024], device_end).expect("device");
        let mut stream = monitor.try_connect(5).expect("broker");
        stream.write_all(&[5; 1000]).expect("writes");
        check(&mut device, &queues, false);
        check(&mut device, &indirect, true);
    }
}
