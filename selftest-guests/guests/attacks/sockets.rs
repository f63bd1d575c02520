//! Packets that belong to no connection, say what isn't so, or come without end.

use crate::attacks::raw::{Descriptor, Raw, SIZE, WRITE};
use crate::attacks::{Outcome, begin, ring};
use crate::rt::report::{check, fail, line};
use crate::rt::{cmdline, time};
use crate::virtio::{NEEDS_RESET, QUEUE_NOTIFY, STATUS, Window};

pub const DEVICE_ID: u32 = 19;

const RX: u32 = 0;
const TX: u32 = 1;

const HEADER: u32 = 44;
const PAYLOAD: u32 = 4096;
/// Bytes of each receive buffer.
const SLOT: u64 = 8192;

const HOST: u64 = 2;
const STREAM: u16 = 1;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;
const CREDIT_REQUEST: u16 = 7;

/// Connections that are asked for at once.
const REQUESTS: u32 = 4096;
/// Bytes of each packet to a connection that nobody reads, and how many there are: more than it has
/// credit for.
const MUCH: u32 = 60_000;
const UNREAD: u16 = 10;

#[derive(Clone, Copy)]
struct Packet {
    source: u64,
    destination: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    kind: u16,
    op: u16,
    flags: u32,
    room: u32,
    taken: u32,
}

impl Packet {
    fn put(&self, raw: Raw) {
        self.put_at(raw, 0);
    }

    fn put_at(&self, raw: Raw, place: u64) {
        raw.put(place, &self.source.to_le_bytes());
        raw.put(place + 8, &self.destination.to_le_bytes());
        let [source, destination] = [self.source_port, self.destination_port];
        for (at, field) in [(16, source), (20, destination), (24, self.length)] {
            raw.put(place + at, &field.to_le_bytes());
        }
        raw.put(place + 28, &self.kind.to_le_bytes());
        raw.put(place + 30, &self.op.to_le_bytes());
        for (at, field) in [(32, self.flags), (36, self.room), (40, self.taken)] {
            raw.put(place + at, &field.to_le_bytes());
        }
    }
}

struct Sockets {
    window: Window,
    seen: u16,
    cid: u64,
    port: u32,
}

pub fn attack(window: Window) {
    let cid = u64::from(window.read(0x104)) << 32 | u64::from(window.read(0x100));
    let port = cmdline::number("vsock_port").unwrap_or(1024) as u32;
    let mut sockets = Sockets { window, seen: 0, cid, port };
    sockets.nonsense();
    sockets.half_open();
    sockets.unheard();
    if let Some(connections) = cmdline::number("vsock_connections") {
        sockets.unread(connections as usize);
    }
}

impl Sockets {
    /// Begins anew, with or without receive buffers.
    fn begin(&mut self, receives: bool) -> bool {
        let began = begin(self.window, 0);
        self.seen = 0;
        let raw = Raw::of(RX);
        for index in 0..if receives { SIZE } else { 0 } {
            self.describe(index);
            raw.offer(index);
        }
        self.window.write(QUEUE_NOTIFY, RX);
        began
    }

    fn describe(&self, index: u16) {
        let raw = Raw::of(RX);
        let address = raw.buffer() + u64::from(index % SIZE) * SLOT;
        let length = HEADER + PAYLOAD;
        raw.describe(index, Descriptor { address, length, flags: WRITE, next: 0 });
    }

    /// A packet as it should be.
    fn packet(&self, op: u16, source_port: u32, destination_port: u32) -> Packet {
        Packet {
            source: self.cid,
            destination: HOST,
            source_port,
            destination_port,
            length: 0,
            kind: STREAM,
            op,
            flags: 0,
            room: 1 << 18,
            taken: 0,
        }
    }

    /// Sends a packet with as many bytes behind it. Whether the device takes it.
    fn send(&self, packet: &Packet, bytes: u32, at_length: bool) -> Outcome {
        let raw = Raw::of(TX);
        packet.put(raw);
        raw.chain(&[(raw.buffer(), HEADER + bytes, false)]);
        let before = raw.used();
        raw.offer(0);
        ring(self.window, TX, before, at_length)
    }

    /// The next packet of the host: what it is, and its two ports.
    fn receive(&mut self) -> Option<(u16, u32, u32)> {
        let raw = Raw::of(RX);
        if raw.used() == self.seen {
            return None;
        }
        let [head, _] = raw.used_chain(self.seen);
        self.seen = self.seen.wrapping_add(1);
        let at = u64::from(head % u32::from(SIZE)) * SLOT;
        let op = u16::from_le_bytes(raw.get(at + 30));
        let ports = [16, 20].map(|field| u32::from_le_bytes(raw.get(at + field)));
        raw.offer(head as u16);
        self.window.write(QUEUE_NOTIFY, RX);
        Some((op, ports[0], ports[1]))
    }

    /// Each is taken, and answered with a reset if at all.
    fn nonsense(&mut self) {
        let mut wrong = 0;
        let base = self.packet(RW, 5000, self.port);
        let packets = [
            Packet { source: 0, ..base },
            Packet { source: HOST, op: REQUEST, ..base },
            Packet { source: u64::MAX, op: REQUEST, ..base },
            Packet { destination: 0, op: REQUEST, ..base },
            Packet { destination: 1, op: REQUEST, ..base },
            Packet { destination: self.cid, op: REQUEST, ..base },
            Packet { destination: u64::MAX, op: REQUEST, ..base },
            Packet { destination_port: 0, op: REQUEST, ..base },
            Packet { destination_port: u32::MAX, op: REQUEST, ..base },
            Packet { kind: 0, op: REQUEST, ..base },
            Packet { kind: 2, op: REQUEST, ..base },
            Packet { kind: u16::MAX, op: REQUEST, ..base },
            Packet { length: 1, op: REQUEST, ..base },
            Packet { length: u32::MAX, op: REQUEST, ..base },
            Packet { length: u32::MAX, ..base },
            Packet { length: PAYLOAD, ..base },
            Packet { op: RESPONSE, ..base },
            Packet { op: SHUTDOWN, flags: u32::MAX, ..base },
            Packet { op: CREDIT_REQUEST, room: 0, taken: u32::MAX, ..base },
            Packet { op: RST, ..base },
        ];
        if !self.begin(true) {
            return fail("sockets", format_args!("the device does not begin"));
        }
        let operations = (0..=u16::MAX).step_by(4369).map(|op| Packet { op, ..base });
        // But for what would connect.
        let operations = operations.filter(|packet| packet.op != REQUEST);
        for packet in packets.into_iter().chain(operations) {
            for bytes in [0, 4] {
                wrong += u32::from(self.send(&packet, bytes, true) != Outcome::Used);
                while let Some((op, ..)) = self.receive() {
                    wrong += u32::from(op != RST);
                }
            }
        }
        check("packets of no connection", wrong == 0, format_args!("{wrong} were not refused"));
    }

    /// Of thousands of connections to the one port, one is made.
    fn half_open(&mut self) {
        if !self.begin(true) {
            return fail("sockets", format_args!("the device does not begin"));
        }
        let (mut made, mut refused) = (0, 0);
        let raw = Raw::of(TX);
        for first in (0..REQUESTS).step_by(SIZE.into()) {
            // As many at a time as there are receive buffers.
            for at in 0..u32::from(SIZE) {
                let place = u64::from(at) * SLOT;
                self.packet(REQUEST, 10_000 + first + at, self.port).put_at(raw, place);
                let flags = 0;
                let (address, length) = (raw.buffer() + place, HEADER);
                raw.describe(at as u16, Descriptor { address, length, flags, next: 0 });
                raw.offer(at as u16);
            }
            self.window.write(QUEUE_NOTIFY, TX);
            let answered = time::wait_until(|| {
                match self.receive() {
                    Some((RESPONSE, ..)) => made += 1,
                    Some((RST, ..)) => refused += 1,
                    _ => {}
                }
                made + refused == first + u32::from(SIZE)
            });
            if !answered {
                return fail("half-open connections", format_args!("{first} were answered"));
            }
        }
        let right = made <= 1 && made + refused == REQUESTS;
        check("half-open connections", right, format_args!("{made} were made"));
    }

    /// When nobody takes its answers, the device takes no more that it would have to answer.
    fn unheard(&mut self) {
        if !self.begin(false) {
            return fail("sockets", format_args!("the device does not begin"));
        }
        let request = self.packet(RW, 1, 1);
        let taken = (0..1 << 16).take_while(|_| self.send(&request, 0, false) == Outcome::Used);
        let taken = taken.count();
        let broken = self.window.read(STATUS) & NEEDS_RESET != 0;
        let right = taken < 1 << 14 && !broken;
        check("answers that nobody takes", right, format_args!("{taken} packets were taken"));
    }

    /// Sends more than it may to connections of the host, who does not read.
    fn unread(&mut self, connections: usize) {
        if !self.begin(true) {
            return fail("sockets", format_args!("the device does not begin"));
        }
        line(format_args!("ok listening"));
        let mut ports = [(0, 0); 256];
        let mut count = 0;
        time::wait_until(|| {
            while let Some((op, host, guest)) = self.receive() {
                if op == REQUEST && count < ports.len() {
                    ports[count] = (host, guest);
                    count += 1;
                }
            }
            count == connections
        });
        check("connections of the host", count == connections, format_args!("{count} came"));
        let mut reset = 0;
        for (host, guest) in &ports[..count] {
            self.send(&self.packet(RESPONSE, *guest, *host), 0, true);
            let data = Packet { length: MUCH, ..self.packet(RW, *guest, *host) };
            let raw = Raw::of(TX);
            data.put(raw);
            raw.chain(&[(raw.buffer(), HEADER + MUCH, false)]);
            let before = raw.used();
            (0..UNREAD).for_each(|_| raw.offer(0));
            self.window.write(QUEUE_NOTIFY, TX);
            time::wait_until(|| {
                while let Some((op, from, _)) = self.receive() {
                    reset += usize::from(op == RST && from == *host);
                }
                raw.used() == before.wrapping_add(UNREAD)
            });
        }
        time::wait_until(|| {
            while let Some((op, ..)) = self.receive() {
                reset += usize::from(op == RST);
            }
            reset >= count
        });
        check("credit", reset >= count, format_args!("{reset} of {count} were reset"));
    }
}
