//! Are the virtio devices where the kernel command line says, and do they behave before any driver
//! has set them up?
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{check, fail, line};
use virtio::{
    ACKNOWLEDGE, DEVICE_ID, DRIVER, MAGIC, QUEUE_READY, QUEUE_SELECT, QUEUE_SIZE_MAX, STATUS,
    VERSION, VERSION_1, Window,
};

/// "virt"
const MAGIC_VALUE: u32 = 0x7472_6976;
const NO_QUEUE: u32 = 1000;

fn main() {
    let mut found = 0;
    for window in virtio::windows() {
        let id = window.read(DEVICE_ID);
        line(format_args!("device base={:#x} line={} id={id}", window.base, window.line));
        registers(window);
        // An id of 0 is a window without a device.
        if id != 0 {
            device(window);
            found += 1;
        }
    }
    if found == 0 {
        fail("devices", format_args!("there is none"));
    }
}

fn registers(window: Window) {
    let (magic, version) = (window.read(MAGIC), window.read(VERSION));
    check("magic value", magic == MAGIC_VALUE, format_args!("{magic:#x}"));
    check("version", version == 2, format_args!("{version}"));
}

fn device(window: Window) {
    let reset = window.reset();
    check("reset", reset, format_args!("status {:#x}", window.read(STATUS)));

    let features = window.features();
    check("features", features & VERSION_1 != 0, format_args!("{features:#x}"));

    window.write(QUEUE_SELECT, 0);
    let (size, ready) = (window.read(QUEUE_SIZE_MAX), window.read(QUEUE_READY));
    check("queue", size > 0 && ready == 0, format_args!("size {size}, ready {ready}"));
    window.write(QUEUE_SELECT, NO_QUEUE);
    let size = window.read(QUEUE_SIZE_MAX);
    check("queue that isn't there", size == 0, format_args!("size {size}"));

    window.write(STATUS, ACKNOWLEDGE | DRIVER);
    let refused = !window.accept(features & !VERSION_1);
    check("driver without version 1", refused, format_args!("its features are accepted"));
    window.reset();
    window.write(STATUS, ACKNOWLEDGE | DRIVER);
    let refused = !window.accept(features | !features & 1 << 41);
    check("feature that isn't offered", refused, format_args!("it is accepted"));
    window.reset();
    window.write(STATUS, ACKNOWLEDGE | DRIVER);
    check("driver", window.accept(features), format_args!("its features are refused"));
    check("reset again", window.reset(), format_args!("status {:#x}", window.read(STATUS)));
}
