//! Registers written and read as no driver does: at any time, in any order, of any width, with any
//! value.

use crate::attacks::{INDIRECT_DESCRIPTORS, begin, memory_end, negotiate, queues, raw, raw::Raw};
use crate::rt::report::check;
use crate::virtio::{
    ACKNOWLEDGE, CONFIG, DEVICE_FEATURES_SELECT, DRIVER, DRIVER_FEATURES, DRIVER_FEATURES_SELECT,
    DRIVER_OK, FEATURES_OK, INTERRUPT_ACK, QUEUE_DESCRIPTORS, QUEUE_NOTIFY, QUEUE_READY,
    QUEUE_SELECT, QUEUE_SIZE, STATUS, VERSION_1, Window,
};

/// Of a window, what has registers and some of the configuration space.
const END: u64 = 0x180;

pub fn attack(window: Window) {
    check("queues that are none", refuses_queues(window), format_args!("one is taken"));
    let refused = refuses_features(window);
    check("features that are none", refused, format_args!("some are taken"));
    any_value(window);
    any_width(window);
    check("registers", window.reset(), format_args!("it does not reset"));
    let kept = keeps_live_queues(window);
    check("queues changed while they are served", kept, format_args!("one has changed"));
}

/// Sizes, alignments and places that a queue can't have.
fn refuses_queues(window: Window) -> bool {
    let good = Raw::of(0).places();
    let taken = |size: u32, places: [u64; 3]| {
        negotiate(window, 0) && window.set_queue(0, size, places)
    };
    let sizes = [0, 3, 15, 17, 1 << 15, (1 << 16) | 16, u32::MAX];
    if sizes.iter().any(|size| taken(*size, good)) {
        return false;
    }
    let outside = [memory_end(), memory_end() - 16, 1 << 40, 0xd000_0000, 0u64.wrapping_sub(64)];
    for part in 0..3 {
        let elsewhere = |place: u64| {
            let mut places = good;
            places[part] = place;
            places
        };
        // Half a unit of alignment off; where nothing is; where it would wrap.
        let misaligned = good[part] + [8, 1, 2][part];
        let mut bad = outside.into_iter().chain([misaligned]);
        if bad.any(|place| taken(raw::SIZE.into(), elsewhere(place))) {
            return false;
        }
    }
    taken(raw::SIZE.into(), good)
}

/// Features that aren't offered, offered ones in a bad order, and none at all.
fn refuses_features(window: Window) -> bool {
    let accepted = |features: u64| {
        window.reset();
        window.write(STATUS, ACKNOWLEDGE);
        window.write(STATUS, ACKNOWLEDGE | DRIVER);
        window.accept(features)
    };
    let offered = window.features();
    if accepted(0) || accepted(u64::MAX) || accepted(offered & !VERSION_1) {
        return false;
    }
    // Served without having agreed on anything.
    window.reset();
    window.write(STATUS, DRIVER_OK);
    window.read(STATUS) & (FEATURES_OK | DRIVER_OK) == 0
}

/// Each register with some values, in each phase.
fn any_value(window: Window) {
    const VALUES: [u32; 5] = [u32::MAX, 0, 1 << 31, 0xd000_0000, 7];
    const PHASES: [u32; 4] = [
        0,
        ACKNOWLEDGE | DRIVER,
        ACKNOWLEDGE | DRIVER | FEATURES_OK,
        ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK,
    ];
    for phase in PHASES {
        for value in VALUES {
            window.reset();
            window.write(STATUS, phase & (ACKNOWLEDGE | DRIVER));
            window.write(DRIVER_FEATURES_SELECT, 1);
            window.write(DRIVER_FEATURES, (VERSION_1 >> 32) as u32);
            window.write(STATUS, phase & (ACKNOWLEDGE | DRIVER | FEATURES_OK));
            window.write(STATUS, phase);
            (0..END).step_by(4).for_each(|register| window.write(register, value));
            for register in (0..END).step_by(4) {
                let _ = window.read(register);
            }
        }
    }
    for queue in [1, 2, 3, 4, 63, 64, 65, 1 << 15, 1 << 16, u32::MAX] {
        window.write(QUEUE_NOTIFY, queue);
    }
    for select in [2, 3, 31, u32::MAX] {
        window.write(DEVICE_FEATURES_SELECT, select);
        window.write(QUEUE_SELECT, select);
        window.write(QUEUE_READY, 1);
        window.write(INTERRUPT_ACK, select);
    }
}

/// Accesses of one, two and eight bytes, and such as straddle two registers.
fn any_width(window: Window) {
    for offset in (0..END - 8).chain(0xff0..0xff8) {
        let (address, aligned) = (window.base + offset, window.base + (offset & !7));
        // SAFETY: within the device's window, which is nobody's memory.
        unsafe {
            core::arch::asm!(
                "mov byte ptr [{address}], 0xff",
                "mov {value:l}, byte ptr [{address}]",
                "mov word ptr [{address}], 0xffff",
                "mov {value:x}, word ptr [{address}]",
                "mov qword ptr [{aligned}], -1",
                "mov {value}, qword ptr [{aligned}]",
                address = in(reg) address,
                aligned = in(reg) aligned,
                value = out(reg) _,
            );
        }
    }
    // Where a configuration space has surely ended.
    window.write(CONFIG + 0xe00, u32::MAX);
    let _ = window.read(CONFIG + 0xe00);
}

/// A queue that is being served can't be moved, resized or taken away but by a reset.
fn keeps_live_queues(window: Window) -> bool {
    if !begin(window, INDIRECT_DESCRIPTORS) {
        return false;
    }
    for queue in 0..queues(window) {
        window.write(QUEUE_SELECT, queue);
        for value in [0, 1, u32::MAX] {
            window.write(QUEUE_SIZE, value);
            window.write(QUEUE_DESCRIPTORS, value);
            window.write(QUEUE_DESCRIPTORS + 4, value);
            window.write(QUEUE_READY, value);
        }
        window.write(QUEUE_READY, 0);
        if window.read(QUEUE_READY) != 1 {
            return false;
        }
    }
    window.reset()
}
