//! Requests to a disk that it has to refuse, and resets while it works.

use crate::attacks::raw::{BUFFER, Descriptor, INDIRECT, NEXT, Raw, SIZE, TABLE, WRITE};
use crate::attacks::{INDIRECT_DESCRIPTORS, Outcome, begin, ring};
use crate::rt::report::{check, fail};
use crate::rt::time;
use crate::virtio::{QUEUE_NOTIFY, Window};

pub const DEVICE_ID: u32 = 2;

const IN: u32 = 0;
const OUT: u32 = 1;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const OK: u8 = 0;
const NO_STATUS: u8 = 0xee;
const HEADER: u64 = 16;
/// Where the data of requests begins in the buffer, and where their status is.
const DATA: u64 = 64;
const STATUS_AT: u64 = 32;

/// Features: discard and write-zeroes.
const FEATURES: u64 = 1 << 13 | 1 << 14;

pub fn attack(window: Window) {
    if !begin(window, FEATURES | INDIRECT_DESCRIPTORS) {
        return fail("disk", format_args!("it does not begin"));
    }
    let sectors = u64::from(window.read(0x104)) << 32 | u64::from(window.read(0x100));
    refuses(window, sectors);
    without_status(window);
    reads_much(window);
    check("reads are done", read(window, 0), format_args!("an honest one is not"));
    resets(window);
}

/// Sends a request whose data is `length` bytes of the buffer; gives its status.
fn send(window: Window, kind: u32, sector: u64, length: u32) -> u8 {
    let raw = Raw::of(0);
    raw.put(0, &kind.to_le_bytes());
    raw.put(4, &[0; 4]);
    raw.put(8, &sector.to_le_bytes());
    raw.put(STATUS_AT, &[NO_STATUS]);
    let from_device = matches!(kind, IN | GET_ID);
    let data = (raw.buffer() + DATA, length, from_device);
    raw.chain(&[(raw.buffer(), HEADER as u32, false), data, (raw.buffer() + STATUS_AT, 1, true)]);
    let before = raw.used();
    raw.offer(0);
    match ring(window, 0, before, true) {
        Outcome::Used => raw.get::<1>(STATUS_AT)[0],
        _ => NO_STATUS,
    }
}

fn read(window: Window, sector: u64) -> bool {
    begin(window, 0) && send(window, IN, sector, 512) == OK
}

/// Each request is answered, and not with success.
fn refuses(window: Window, sectors: u64) {
    let mut wrong = 0;
    let mut refused = |kind: u32, sector: u64, length: u32| {
        let status = send(window, kind, sector, length);
        wrong += u32::from(status == OK || status == NO_STATUS);
    };
    for kind in [IN, OUT] {
        for sector in [sectors, sectors - 1, u64::MAX, u64::MAX / 512, 1 << 55, 1 << 63] {
            refused(kind, sector, 1024);
        }
        for length in [1, 511, 513, 1023] {
            refused(kind, 0, length);
        }
    }
    refused(GET_ID, 0, 19);
    for kind in [2, 3, 5, 7, 9, 10, 12, 14, 1 << 31, u32::MAX] {
        refused(kind, 0, 512);
    }
    // Ranges: sector, sectors, flags.
    for (sector, count, flags) in [
        (sectors, 1, 0),
        (u64::MAX, 1, 0),
        (0, u32::MAX, 0),
        (u64::MAX, u32::MAX, 0),
        (0, 1, 2),
        (0, 1, u32::MAX),
    ] {
        let raw = Raw::of(0);
        raw.put(DATA, &sector.to_le_bytes());
        raw.put(DATA + 8, &u32::to_le_bytes(count));
        raw.put(DATA + 12, &u32::to_le_bytes(flags));
        refused(DISCARD, 0, 16);
        refused(WRITE_ZEROES, 0, 16);
    }
    for length in [1, 15, 17, 16 * 1024] {
        refused(DISCARD, 0, length);
        refused(WRITE_ZEROES, 0, length);
    }
    check("bad requests", wrong == 0, format_args!("{wrong} were not refused"));
}

/// A request without a place for its status leaves no way to answer.
fn without_status(window: Window) {
    let raw = Raw::of(0);
    raw.chain(&[(raw.buffer(), HEADER as u32, false)]);
    let before = raw.used();
    raw.offer(0);
    let broken = ring(window, 0, before, true) == Outcome::Broken;
    check("a request without status", broken, format_args!("it is answered"));
}

/// Chains of many descriptors, all of the same buffer: much to read for little memory.
fn reads_much(window: Window) {
    let mut answered = begin(window, INDIRECT_DESCRIPTORS);
    let raw = Raw::of(0);
    raw.put(0, &[0; HEADER as usize]);
    let head = Descriptor { address: raw.buffer(), length: HEADER as u32, flags: NEXT, next: 1 };
    raw.describe_indirect(0, head);
    for index in 1..INDIRECT {
        let (address, next) = (raw.buffer() + DATA, index + 1);
        let last = next == INDIRECT;
        let length = if last { 1 } else { BUFFER as u32 / 2 };
        let flags = if last { WRITE } else { NEXT | WRITE };
        raw.describe_indirect(index, Descriptor { address, length, flags, next });
    }
    let length = u32::from(INDIRECT) * 16;
    let table = Descriptor { address: raw.table(), length, flags: TABLE, next: 0 };
    raw.describe(0, table);
    for _ in 0..20 {
        let before = raw.used();
        raw.offer(0);
        answered &= ring(window, 0, before, true) == Outcome::Used;
    }
    check("many buffers at a time", answered, format_args!("a request is not answered"));
}

/// A reset while requests are under way ends them: when it is done nothing is written any more.
fn resets(window: Window) {
    let mut late = 0;
    for _ in 0..100 {
        if !begin(window, 0) {
            return fail("resets", format_args!("it does not begin"));
        }
        let raw = Raw::of(0);
        raw.put(0, &[0; HEADER as usize]);
        let length = 512 * 100;
        let data = (raw.buffer() + DATA, length, true);
        raw.chain(&[(raw.buffer(), HEADER as u32, false), data, (raw.buffer() + STATUS_AT, 1, true)]);
        (0..SIZE).for_each(|_| raw.offer(0));
        window.write(QUEUE_NOTIFY, 0);
        if !window.reset() {
            return fail("resets", format_args!("it does not reset"));
        }
        raw.put(STATUS_AT, &[NO_STATUS]);
        raw.put(DATA, &[0xa5; 8]);
        let used = raw.used();
        time::pause(200_000);
        let untouched = raw.get::<8>(DATA) == [0xa5; 8] && raw.get::<1>(STATUS_AT) == [NO_STATUS];
        late += u32::from(!untouched || raw.used() != used);
    }
    check("resets", late == 0, format_args!("{late} times something was written afterwards"));
}
