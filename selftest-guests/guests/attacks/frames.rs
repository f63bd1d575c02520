//! Frames with headers that promise what isn't there.

use crate::attacks::raw::Raw;
use crate::attacks::{Outcome, begin, ring};
use crate::rt::report::{check, fail};
use crate::virtio::Window;

pub const DEVICE_ID: u32 = 1;

const TX: u32 = 1;
const HEADER: u64 = 12;

/// `VIRTIO_NET_F_CSUM` and what a host may be asked to cut up.
const FEATURES: u64 = 1 | 0xf << 11 | 1 << 15;

/// Header: flags, kind of segmentation, and three lengths; then how long the frame is.
const FRAMES: &[(u8, u8, [u16; 4], u32)] = &[
    (0, 0, [0; 4], 0),
    (0, 0, [0; 4], 1),
    (0, 0, [0; 4], 13),
    (0, 0, [0; 4], 100_000),
    (1, 0, [0, 0, u16::MAX, u16::MAX], 60),
    (1, 0, [0, 0, 59, 2], 60),
    (1, 1, [u16::MAX, u16::MAX, 34, 16], 1500),
    (1, 1, [54, 0, 34, 16], 60_000),
    (1, 4, [54, 1, 34, 16], 60_000),
    (0, 1, [54, 1448, 0, 0], 60_000),
    (0, 3, [0, 8, 0, 0], 60_000),
    (1, 0x81, [54, 1448, 34, 16], 60_000),
    (u8::MAX, u8::MAX, [u16::MAX; 4], 1500),
    (2, 0xff, [0; 4], 60),
];

pub fn attack(window: Window) {
    if !begin(window, FEATURES) {
        return fail("network", format_args!("it does not begin"));
    }
    let raw = Raw::of(TX);
    let mut unanswered = 0;
    for (flags, kind, lengths, frame) in FRAMES {
        raw.put(0, &[*flags, *kind]);
        for (at, length) in lengths.iter().enumerate() {
            raw.put(2 + 2 * at as u64, &length.to_le_bytes());
        }
        raw.chain(&[(raw.buffer(), HEADER as u32 + frame, false)]);
        let before = raw.used();
        raw.offer(0);
        if ring(window, TX, before, true) != Outcome::Used {
            unanswered += 1;
            begin(window, FEATURES);
        }
    }
    for part in 0..HEADER as u32 {
        raw.chain(&[(raw.buffer(), part, false)]);
        let before = raw.used();
        raw.offer(0);
        // Less than a header: dropped, or the end of the device until it is reset.
        if ring(window, TX, before, true) == Outcome::Broken && !begin(window, FEATURES) {
            return fail("network", format_args!("it does not begin anew"));
        }
    }
    check("bad frames", unanswered == 0, format_args!("{unanswered} were not taken"));
}
