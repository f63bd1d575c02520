//! Rings and descriptors as no driver makes them, in every queue of a device.

use crate::attacks::raw::{BUFFER, Descriptor, INDIRECT, NEXT, Raw, SIZE, TABLE, WRITE};
use crate::attacks::{
    INDIRECT_DESCRIPTORS, Outcome, begin, block, files, memory_end, queues, ring,
};
use crate::rt::report::{fail, ok};
use crate::virtio::Window;

struct Case {
    name: &'static str,
    /// Whether indirect descriptors are agreed on.
    indirect: bool,
    make: fn(Raw),
}

const fn direct(name: &'static str, make: fn(Raw)) -> Case {
    Case { name, indirect: false, make }
}

const fn indirect(name: &'static str, make: fn(Raw)) -> Case {
    Case { name, indirect: true, make }
}

const CASES: &[Case] = &[
    direct("a head past the table", |raw| {
        raw.chain(&[(raw.buffer(), 64, true)]);
        raw.offer(SIZE);
    }),
    direct("the largest head", |raw| raw.offer(u16::MAX)),
    direct("more chains than the queue holds", |raw| {
        raw.chain(&[(raw.buffer(), 64, true)]);
        raw.set_available(SIZE + 1);
    }),
    direct("half of all chains there could be", |raw| raw.set_available(1 << 15)),
    direct("an index that goes back", |raw| raw.set_available(u16::MAX)),
    direct("a descriptor that follows itself", |raw| {
        raw.describe(0, Descriptor { address: raw.buffer(), length: 64, flags: NEXT, next: 0 });
        raw.offer(0);
    }),
    direct("descriptors that follow each other", |raw| {
        for index in 0..SIZE {
            let next = (index + 1) % SIZE;
            let flags = NEXT | WRITE;
            raw.describe(index, Descriptor { address: raw.buffer(), length: 64, flags, next });
        }
        raw.offer(3);
    }),
    direct("a next past the table", |raw| {
        raw.describe(0, Descriptor { address: raw.buffer(), length: 64, flags: NEXT, next: SIZE });
        raw.offer(0);
    }),
    direct("the largest next", |raw| {
        let (address, next) = (raw.buffer(), u16::MAX);
        raw.describe(0, Descriptor { address, length: 64, flags: NEXT | WRITE, next });
        raw.offer(0);
    }),
    direct("a buffer beyond memory", |raw| one(raw, 1 << 40, 64)),
    direct("a buffer over the end of memory", |raw| one(raw, memory_end() - 32, 64)),
    direct("a buffer over the end of all addresses", |raw| one(raw, u64::MAX - 8, 64)),
    direct("a buffer in a device's registers", |raw| one(raw, 0xd000_0000, 64)),
    direct("a buffer of all memory and more", |raw| one(raw, 0, u32::MAX)),
    direct("a buffer of nothing", |raw| one(raw, raw.buffer(), 0)),
    direct("a buffer of nothing nowhere", |raw| one(raw, u64::MAX, 0)),
    direct("what is read behind what is written", |raw| {
        raw.chain(&[(raw.buffer(), 64, true), (raw.buffer(), 64, false)]);
        raw.offer(0);
    }),
    direct("nothing to read", |raw| {
        raw.chain(&[(raw.buffer(), 64, true)]);
        raw.offer(0);
    }),
    direct("nothing to write", |raw| {
        raw.chain(&[(raw.buffer(), 64, false)]);
        raw.offer(0);
    }),
    direct("one byte in each descriptor", |raw| {
        let parts: [_; SIZE as usize] = core::array::from_fn(|at| (raw.buffer(), 1, at >= 8));
        raw.chain(&parts);
        raw.offer(0);
    }),
    direct("a descriptor in every chain", |raw| {
        raw.chain(&[(raw.buffer(), 64, false), (raw.buffer(), 64, true)]);
        (0..SIZE).for_each(|_| raw.offer(0));
    }),
    direct("what is written over the descriptors", |raw| {
        let [descriptors, ..] = raw.places();
        raw.chain(&[(raw.buffer(), 16, false), (descriptors, 256, true)]);
        raw.offer(0);
    }),
    direct("what is written over the driver's area", |raw| {
        let [_, driver, _] = raw.places();
        raw.chain(&[(raw.buffer(), 16, false), (driver, 36, true)]);
        raw.offer(0);
    }),
    direct("what is written over the device's area", |raw| {
        let [.., device] = raw.places();
        raw.chain(&[(raw.buffer(), 16, false), (device, 132, true)]);
        raw.offer(0);
    }),
    direct("a table that was not agreed on", |raw| table(raw, raw.table(), 32, 0)),
    indirect("a table of nothing", |raw| table(raw, raw.table(), 0, 0)),
    indirect("a table and a half descriptor", |raw| table(raw, raw.table(), 24, 0)),
    indirect("a table beyond memory", |raw| table(raw, 1 << 40, 32, 0)),
    indirect("a table over the end of memory", |raw| table(raw, memory_end() - 16, 64, 0)),
    indirect("a table over the end of all addresses", |raw| table(raw, u64::MAX - 15, 64, 0)),
    indirect("a table of all memory", |raw| table(raw, 0, u32::MAX & !15, 0)),
    indirect("a table that something follows", |raw| table(raw, raw.table(), 32, NEXT)),
    indirect("a table that is to be written", |raw| table(raw, raw.table(), 32, WRITE)),
    indirect("a table in a table", |raw| {
        let inner = Descriptor { address: raw.table(), length: 32, flags: TABLE, next: 0 };
        raw.describe_indirect(0, inner);
        table(raw, raw.table(), 32, 0);
    }),
    indirect("a table that goes in circles", |raw| {
        let (address, flags) = (raw.buffer(), NEXT);
        raw.describe_indirect(0, Descriptor { address, length: 8, flags, next: 1 });
        raw.describe_indirect(1, Descriptor { address, length: 8, flags, next: 0 });
        table(raw, raw.table(), 32, 0);
    }),
    indirect("a table whose next is past it", |raw| {
        let (address, flags) = (raw.buffer(), NEXT);
        raw.describe_indirect(0, Descriptor { address, length: 8, flags, next: INDIRECT });
        table(raw, raw.table(), 32, 0);
    }),
    indirect("a table longer than the queue", |raw| {
        for index in 0..INDIRECT {
            let flags = if index + 1 < INDIRECT { NEXT | WRITE } else { WRITE };
            let (address, next) = (raw.buffer(), index + 1);
            raw.describe_indirect(index, Descriptor { address, length: BUFFER as u32, flags, next });
        }
        table(raw, raw.table(), u32::from(INDIRECT) * 16, 0);
    }),
];

/// A chain of a descriptor that the device reads and one that it writes, both of this.
fn one(raw: Raw, address: u64, length: u32) {
    raw.chain(&[(address, length, false), (address, length, true)]);
    raw.offer(0);
}

fn table(raw: Raw, address: u64, length: u32, flags: u16) {
    raw.describe(0, Descriptor { address, length, flags: TABLE | flags, next: 1 });
    raw.offer(0);
}

/// Whether a device looks at a queue as soon as its bell is rung.
fn is_eager(device: u32, queue: u32) -> bool {
    const ENTROPY: u32 = 4;
    const BALLOON: u32 = 5;
    match device {
        block::DEVICE_ID | ENTROPY | BALLOON => true,
        // Another process's, which has no way to say that a queue is broken.
        files::DEVICE_ID => false,
        // The others' first queue waits for what the host has; of sockets, the last is never used.
        _ => queue == 1,
    }
}

pub fn attack(window: Window, device: u32) {
    for queue in 0..queues(window) {
        for case in CASES {
            let features = if case.indirect { INDIRECT_DESCRIPTORS } else { 0 };
            let raw = Raw::of(queue);
            if !begin(window, features) {
                return fail("rings", format_args!("device {device} does not begin anew"));
            }
            (case.make)(raw);
            let eager = is_eager(device, queue);
            if ring(window, queue, 0, eager) == Outcome::Nothing && eager {
                let name = case.name;
                fail("rings", format_args!("{name}: device {device} says nothing in {queue}"));
            }
        }
    }
    ok("rings");
}
