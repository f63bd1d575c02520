//! Random conversations, against a model of what each side may see.

use std::collections::HashMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;

use proptest::prelude::*;

use super::*;
use crate::virtio::vsock::BUFFER_SIZE;
use crate::virtio::vsock::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};

/// Bytes that the guest lends to each connection.
const GUEST_BUFFER: u32 = 20_000;

#[derive(Debug, Clone)]
enum Step {
    HostWrites(usize, usize),
    HostReads(usize, usize),
    HostEnds(usize),
    GuestSends(usize, usize),
    GuestConsumes(usize, u32),
    GuestEnds(usize),
    GuestTakes(usize),
    /// A packet that belongs to nothing, its fields from these numbers.
    Garbage([u32; 8]),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let connection = 0..3usize;
    prop::collection::vec(
        prop_oneof![
            4 => (connection.clone(), 0..60_000usize).prop_map(|(c, n)| Step::HostWrites(c, n)),
            3 => (connection.clone(), 0..90_000usize).prop_map(|(c, n)| Step::HostReads(c, n)),
            1 => connection.clone().prop_map(Step::HostEnds),
            4 => (connection.clone(), 0..70_000usize).prop_map(|(c, n)| Step::GuestSends(c, n)),
            3 => (connection.clone(), 0..GUEST_BUFFER).prop_map(|(c, n)| Step::GuestConsumes(c, n)),
            1 => connection.prop_map(Step::GuestEnds),
            4 => (0..20usize).prop_map(Step::GuestTakes),
            1 => any::<[u32; 8]>().prop_map(Step::Garbage),
        ],
        0..120,
    )
}

/// One direction's bytes: a running number, so that loss and reordering show.
fn byte(at: u64) -> u8 {
    (at ^ (at >> 8) ^ (at >> 16)) as u8
}

fn bytes(from: u64, count: usize) -> Vec<u8> {
    (from..from + count as u64).map(byte).collect()
}

/// What is known of a connection from outside of the device.
struct Side {
    stream: UnixStream,
    guest_port: u32,
    host_port: u32,
    host_wrote: u64,
    host_read: u64,
    host_ended: bool,
    guest_sent: u64,
    guest_received: u64,
    guest_consumed: Wrapping<u32>,
    guest_ended: bool,
    /// The guest was told that the host sends no more.
    end_told: bool,
    /// The device's credit, as the guest was told last.
    forwarded: Wrapping<u32>,
}

impl Side {
    fn header(&self, op: Op) -> Header {
        Header {
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: self.guest_consumed.0,
            ..header(op, self.guest_port, self.host_port)
        }
    }

    fn read(&mut self, limit: usize) {
        let mut buffer = vec![0; limit];
        match self.stream.read(&mut buffer) {
            Ok(count) => {
                assert!(
                    buffer[..count] == bytes(self.host_read, count),
                    "wrong bytes for the host"
                );
                self.host_read += count as u64;
                assert!(self.host_read <= self.guest_sent);
            }
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
    }
}

struct Conversation {
    harness: Harness,
    sides: Vec<Side>,
    resets_expected: HashMap<(u32, u32), usize>,
}

impl Conversation {
    fn new() -> Self {
        let mut harness = Harness::new(&[]);
        let sides = (0..3u32)
            .map(|index| {
                let guest_port = 100 + index;
                let (host_port, stream) = harness.connect_to_guest(guest_port);
                Side {
                    stream,
                    guest_port,
                    host_port,
                    host_wrote: 0,
                    host_read: 0,
                    host_ended: false,
                    guest_sent: 0,
                    guest_received: 0,
                    guest_consumed: Wrapping(0),
                    guest_ended: false,
                    end_told: false,
                    forwarded: Wrapping(0),
                }
            })
            .collect();
        let mut conversation = Self { harness, sides, resets_expected: HashMap::new() };
        for index in 0..3 {
            let update = conversation.sides[index].header(Op::CreditUpdate);
            conversation.harness.send(update, &[]);
        }
        conversation
    }

    fn take(&mut self, step: &Step) {
        match *step {
            Step::HostWrites(index, count) => {
                let side = &mut self.sides[index];
                if side.host_ended || count == 0 {
                    return;
                }
                match side.stream.write(&bytes(side.host_wrote, count)) {
                    Ok(count) => side.host_wrote += count as u64,
                    Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
                }
            }
            Step::HostReads(index, limit) => self.sides[index].read(limit),
            Step::HostEnds(index) => {
                self.sides[index].host_ended = true;
                self.sides[index].stream.shutdown(Shutdown::Write).expect("half-closes");
            }
            Step::GuestSends(index, count) => {
                let side = &mut self.sides[index];
                let in_flight = Wrapping(side.guest_sent as u32) - side.forwarded;
                let count = count.min((BUFFER_SIZE - in_flight.0) as usize);
                if side.guest_ended || count == 0 {
                    return;
                }
                let data = bytes(side.guest_sent, count);
                side.guest_sent += count as u64;
                self.harness.send(side.header(Op::Data), &data);
            }
            Step::GuestConsumes(index, count) => {
                let side = &mut self.sides[index];
                let held = Wrapping(side.guest_received as u32) - side.guest_consumed;
                side.guest_consumed += count.min(held.0);
                let update = side.header(Op::CreditUpdate);
                self.harness.send(update, &[]);
            }
            Step::GuestEnds(index) => {
                let side = &mut self.sides[index];
                side.guest_ended = true;
                let end = Header { flags: SHUTDOWN_SEND, ..side.header(Op::Shutdown) };
                self.harness.send(end, &[]);
            }
            Step::GuestTakes(count) => {
                for _ in 0..count {
                    self.take_packet();
                }
            }
            Step::Garbage(fields) => {
                let [a, b, c, d, e, f, g, h] = fields;
                let garbage = Header {
                    src_cid: if a % 4 == 0 { a.into() } else { CID },
                    dst_cid: if b % 4 == 0 { b.into() } else { HOST_CID },
                    src_port: c,
                    // No port that a connection has.
                    dst_port: d % (1 << 30),
                    len: e % 64,
                    kind: if f % 4 == 0 { f as u16 } else { TYPE_STREAM },
                    op: (g % 9) as u16,
                    flags: h,
                    buf_alloc: h,
                    fwd_cnt: g,
                };
                if garbage.op != Op::Reset as u16 {
                    let key = (garbage.src_port, garbage.dst_port);
                    *self.resets_expected.entry(key).or_default() += 1;
                }
                self.harness.send_raw(garbage, &[0; 32]);
            }
        }
    }

    /// Takes a packet as the guest and checks all that must hold of it.
    fn take_packet(&mut self) -> bool {
        let Some(packet) = self.harness.next() else { return false };
        let Header { src_port, dst_port, fwd_cnt, flags, .. } = packet.header;
        assert_eq!(packet.header.dst_cid, CID);
        let side = self.sides.iter_mut().find(|side| side.host_port == src_port);
        let Some(side) = side else {
            assert_eq!(packet.op(), Some(Op::Reset));
            let left = self.resets_expected.get_mut(&(dst_port, src_port)).expect("expected");
            *left = left.checked_sub(1).expect("one reset a packet");
            return true;
        };
        assert_eq!(dst_port, side.guest_port);
        assert_eq!(packet.header.buf_alloc, BUFFER_SIZE);
        let told = Wrapping(fwd_cnt);
        assert!((told - side.forwarded).0 <= BUFFER_SIZE, "credit only grows");
        assert!((Wrapping(side.guest_sent as u32) - told).0 <= BUFFER_SIZE);
        side.forwarded = told;
        match packet.op() {
            Some(Op::Data) => {
                assert!(!side.end_told, "data after its end");
                assert!(!packet.data.is_empty());
                assert!(packet.data == bytes(side.guest_received, packet.data.len()));
                side.guest_received += packet.data.len() as u64;
                let in_flight = Wrapping(side.guest_received as u32) - side.guest_consumed;
                assert!(in_flight.0 <= GUEST_BUFFER, "more in flight than credit");
                assert!(side.guest_received <= side.host_wrote);
            }
            Some(Op::Shutdown) => {
                assert!(side.host_ended);
                assert_eq!(side.guest_received, side.host_wrote, "the end before the last byte");
                assert_ne!(flags & SHUTDOWN_SEND, 0);
                if flags & SHUTDOWN_RECEIVE != 0 {
                    assert!(side.guest_ended, "both directions have ended");
                }
                side.end_told = true;
            }
            Some(Op::CreditUpdate | Op::CreditRequest) => {}
            other => panic!("unexpected {other:?}"),
        }
        true
    }

    /// Everybody reads until nothing moves: then everything has arrived.
    fn finish(&mut self) {
        loop {
            let mut moved = false;
            while self.take_packet() {
                moved = true;
            }
            for index in 0..self.sides.len() {
                let side = &mut self.sides[index];
                let before = side.host_read;
                side.read(1 << 20);
                moved |= side.host_read != before;
                if side.guest_consumed != Wrapping(side.guest_received as u32) {
                    side.guest_consumed = Wrapping(side.guest_received as u32);
                    let update = side.header(Op::CreditUpdate);
                    self.harness.send(update, &[]);
                    moved = true;
                }
            }
            if !moved {
                break;
            }
        }
        for side in &mut self.sides {
            assert_eq!(side.host_read, side.guest_sent);
            assert_eq!(side.guest_received, side.host_wrote);
            assert_eq!(side.end_told, side.host_ended);
            let end = side.stream.read(&mut [0; 1]).map_err(|error| error.kind());
            assert_eq!(end, if side.guest_ended { Ok(0) } else { Err(ErrorKind::WouldBlock) });
        }
        assert!(self.resets_expected.values().all(|left| *left == 0), "a packet without answer");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn nothing_is_lost_reordered_or_sent_without_credit(steps in steps()) {
        let mut conversation = Conversation::new();
        for step in &steps {
            conversation.take(step);
        }
        conversation.finish();
    }

    #[test]
    fn any_packets_leave_the_device_working(
        packets in prop::collection::vec(
            (any::<[u32; 4]>(), 0..9u16, 0..4u32, 0..6u32, 0..80u32), 0..200),
    ) {
        let mut harness = Harness::new(&[1024, 1025]);
        let streams: Vec<_> = (0..3).map(|port| harness.connect_to_guest(100 + port)).collect();
        for ([flags, buf_alloc, fwd_cnt, kind], op, from, to, len) in packets {
            let to = streams.get(to as usize).map_or(1020 + to, |(port, _)| *port);
            let packet = Header {
                op,
                flags,
                buf_alloc,
                fwd_cnt,
                len,
                kind: if kind % 8 == 0 { kind as u16 } else { TYPE_STREAM },
                ..header(Op::Data, 100 + from, to)
            };
            harness.send_raw(packet, &[7; 64]);
            while let Some(packet) = harness.next() {
                prop_assert_eq!(packet.header.dst_cid, CID);
                prop_assert!(packet.header.len <= ROOM);
            }
        }
        harness.mux.reset();
        let (port, mut stream) = harness.connect_to_guest(7);
        harness.send(header(Op::Data, 7, port), b"works");
        let mut data = [0; 5];
        stream.read_exact(&mut data).expect("reads");
    }
}
