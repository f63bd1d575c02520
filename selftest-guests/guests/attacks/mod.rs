//! What a driver must not do, and how it is found out what came of it.

#![allow(dead_code, reason = "no guest needs all of this")]

pub mod block;
pub mod files;
pub mod frames;
pub mod race;
pub mod raw;
pub mod registers;
pub mod rings;
pub mod sockets;

use crate::rt::{cmdline, time};
use crate::virtio::{
    ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, QUEUE_NOTIFY, QUEUE_SELECT,
    QUEUE_SIZE_MAX, STATUS, VERSION_1, Window,
};
use raw::Raw;

/// The ring's feature of indirect descriptors.
pub const INDIRECT_DESCRIPTORS: u64 = 1 << 28;

/// Ticks after which what was to come has come, where nothing may.
const A_MOMENT: u64 = 5_000_000;

/// Where memory ends.
pub fn memory_end() -> u64 {
    cmdline::number("memory_mib").unwrap_or(64) << 20
}

/// How many queues a device has.
pub fn queues(window: Window) -> u32 {
    let has = |queue: &u32| {
        window.write(QUEUE_SELECT, *queue);
        window.read(QUEUE_SIZE_MAX) != 0
    };
    (0..raw::QUEUES).take_while(has).count() as u32
}

/// Takes a device over, with these features of those that it offers, and gives it empty queues.
/// Whether it takes them.
pub fn begin(window: Window, features: u64) -> bool {
    if !negotiate(window, features) {
        return false;
    }
    for queue in 0..queues(window) {
        let raw = Raw::of(queue);
        raw.clear();
        if !window.set_queue(queue, raw::SIZE.into(), raw.places()) {
            return false;
        }
    }
    window.write(STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
    window.read(STATUS) & NEEDS_RESET == 0
}

/// As far as the setting up of queues.
pub fn negotiate(window: Window, features: u64) -> bool {
    if !window.reset() {
        return false;
    }
    window.write(STATUS, ACKNOWLEDGE);
    window.write(STATUS, ACKNOWLEDGE | DRIVER);
    let features = window.features() & (features | VERSION_1);
    window.accept(features)
}

/// What a device made of what it was given.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It gave up until it is reset.
    Broken,
    /// It used something.
    Used,
    /// Nothing yet.
    Nothing,
}

/// Rings a queue's doorbell and waits until the device has used another chain than the `before`th, for a
/// moment or as long as it takes. (The device may have seen what was offered before its bell rings.)
pub fn ring(window: Window, queue: u32, before: u16, at_length: bool) -> Outcome {
    let raw = Raw::of(queue);
    window.write(QUEUE_NOTIFY, queue);
    let mut outcome = Outcome::Nothing;
    let start = time::ticks();
    let done = || {
        // Memory is looked at for nothing; a register costs the host something.
        for _ in 0..1000 {
            if raw.used() != before {
                outcome = Outcome::Used;
                return true;
            }
            core::hint::spin_loop();
        }
        if window.read(STATUS) & NEEDS_RESET != 0 {
            outcome = Outcome::Broken;
        }
        let overdue = !at_length && time::ticks().wrapping_sub(start) > A_MOMENT;
        outcome != Outcome::Nothing || overdue
    };
    time::wait_until(done);
    outcome
}
