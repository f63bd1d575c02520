//! FUSE requests with names, sizes and node ids that are none.

use crate::attacks::raw::Raw;
use crate::attacks::{Outcome, begin, ring};
use crate::rt::report::{check, fail};
use crate::virtio::Window;

pub const DEVICE_ID: u32 = 26;

const QUEUE: u32 = 1;
const HEADER: usize = 40;
/// Where in the buffer replies go, and how much room they have.
const REPLY: u64 = 96 << 10;
const ROOM: u32 = 16 << 10;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const INIT: u32 = 26;
const DESTROY: u32 = 38;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const TOP: u64 = 1;

const INVALID: i32 = 22;
/// Files that are made.
const FILES: u32 = 300;

/// What a request came to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answer {
    Error(i32),
    /// The chain was used and nothing written.
    Silence,
    Broken,
}

pub fn attack(window: Window) {
    let Some(rootfs) = session(window) else {
        return fail("files", format_args!("they can't be looked up"));
    };
    names(window, rootfs);
    many(window, rootfs);
    let Some(rootfs) = session(window) else {
        return fail("files", format_args!("they can't be looked up any more"));
    };
    bodies(window, rootfs);
    lengths(window);
    check("files afterwards", session(window).is_some(), format_args!("there are none"));
}

/// Begins anew; gives the root file system's node id.
fn session(window: Window) -> Option<u64> {
    if !begin(window, 0) {
        return None;
    }
    let mut body = [0; 64];
    for (at, field) in [(0, 7u32), (4, 38), (8, 1 << 20), (12, u32::MAX), (16, u32::MAX)] {
        body[at..at + 4].copy_from_slice(&field.to_le_bytes());
    }
    if send(window, INIT, 0, &body, None, ROOM) != Answer::Error(0) {
        return None;
    }
    look_up(window, TOP, b"rootfs\0")
}

fn look_up(window: Window, parent: u64, name: &[u8]) -> Option<u64> {
    let found = send(window, LOOKUP, parent, name, None, ROOM) == Answer::Error(0);
    found.then(|| u64::from_le_bytes(Raw::of(QUEUE).get(REPLY + 16)))
}

/// Sends a request; `length` is what its header says, if not the truth.
fn send(
    window: Window,
    opcode: u32,
    node: u64,
    body: &[u8],
    length: Option<u32>,
    room: u32,
) -> Answer {
    let raw = Raw::of(QUEUE);
    let truth = (HEADER + body.len()) as u32;
    raw.put(0, &[0; HEADER]);
    raw.put(0, &length.unwrap_or(truth).to_le_bytes());
    raw.put(4, &opcode.to_le_bytes());
    raw.put(8, &7u64.to_le_bytes());
    raw.put(16, &node.to_le_bytes());
    raw.put(HEADER as u64, body);
    raw.put(REPLY, &[0; 16]);
    raw.chain(&[(raw.buffer(), truth, false), (raw.buffer() + REPLY, room, true)]);
    let before = raw.used();
    raw.offer(0);
    if ring(window, QUEUE, before, true) != Outcome::Used {
        return Answer::Broken;
    }
    match raw.used_chain(before) {
        [_, 0] => Answer::Silence,
        _ => Answer::Error(-i32::from_le_bytes(raw.get(REPLY + 4))),
    }
}

fn names(window: Window, rootfs: u64) {
    static LONG: [u8; 60_000] = [b'n'; 60_000];
    let mut wrong = 0;
    // The body's fixed part, by operation.
    for (opcode, before) in [(LOOKUP, 0), (UNLINK, 0), (RMDIR, 0), (MKDIR, 8), (MKNOD, 16)] {
        for name in [&b"..\0"[..], b".\0", b"\0", b"a/b\0", b"/etc/passwd\0", b"../secret\0", b"dir/\0"]
        {
            let mut body = [0; 64];
            body[before..before + name.len()].copy_from_slice(name);
            let answer =
                send(window, opcode, rootfs, &body[..before + name.len()], None, ROOM);
            wrong += u32::from(answer != Answer::Error(INVALID));
        }
        // Without an end; longer than a name may be; longer than anything.
        for length in [0, 1, 39, 256, 4096, 60_000] {
            let answer = send(window, opcode, rootfs, &LONG[..length], None, ROOM);
            wrong += u32::from(matches!(answer, Answer::Error(0) | Answer::Broken));
        }
    }
    check("bad names", wrong == 0, format_args!("{wrong} were not refused"));
}

/// More and more files, none of which is forgotten.
fn many(window: Window, rootfs: u64) {
    let mut made = 0;
    for number in 0..FILES {
        let mut body = [0; 25];
        body[..4].copy_from_slice(&0o100_644u32.to_le_bytes());
        for at in 0..8 {
            body[16 + at] = b'a' + (number >> (3 * at) & 7) as u8;
        }
        made += u32::from(send(window, MKNOD, rootfs, &body, None, ROOM) == Answer::Error(0));
    }
    check("many files", made == FILES, format_args!("{made} were made"));
}

/// Every operation on every kind of node, with arguments of nothing, of zeroes and of ones.
fn bodies(window: Window, rootfs: u64) {
    let mut broken = 0;
    for opcode in (0..60).chain([4096, 1 << 31, u32::MAX]) {
        if matches!(opcode, INIT | DESTROY) {
            continue;
        }
        for node in [0, TOP, rootfs, rootfs + 1, TOP << 48 | TOP, u64::MAX] {
            for (byte, length) in [(0, 0), (0, 64), (0xff, 64), (0x7f, 127)] {
                let answer = send(window, opcode, node, &[byte; 128][..length], None, ROOM);
                let silent = matches!(opcode, FORGET | INTERRUPT | BATCH_FORGET);
                let right = match answer {
                    Answer::Error(number) => (0..4096).contains(&number),
                    Answer::Silence => silent,
                    Answer::Broken => false,
                };
                broken += u32::from(!right);
            }
        }
    }
    check("bad arguments", broken == 0, format_args!("{broken} were not answered"));
}

/// Headers that say another length, and replies without room.
fn lengths(window: Window) {
    let mut broken = 0;
    for length in [0, 1, 39, 41, 1 << 20, 1 << 31, u32::MAX] {
        let answer = send(window, LOOKUP, TOP, b"rootfs\0", Some(length), ROOM);
        broken += u32::from(answer == Answer::Broken);
    }
    for room in [0, 1, 15, 16, 17] {
        let answer = send(window, LOOKUP, TOP, b"rootfs\0", None, room);
        broken += u32::from(answer == Answer::Broken);
    }
    check("bad lengths", broken == 0, format_args!("{broken} ended the device"));
}
