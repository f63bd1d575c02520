//! Writes to its console for ever: to the serial port, and to a virtio console if there is one.
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{fail, line};
use virtio::queue::{Buffer, Ring};
use virtio::{Device, Error, Window};

const CONSOLE: u32 = 3;
const TRANSMIT: u32 = 1;

static mut RINGS: [Ring; 2] = [const { Ring::new() }; 2];
static TEXT: [u8; 4096] = [b'x'; 4096];

fn main() {
    for window in virtio::find(CONSOLE).take(1) {
        if let Err(error) = console(window) {
            fail("console", format_args!("{error}"));
        }
    }
    let mut count = 0u64;
    loop {
        count += 1;
        line(format_args!("line {count} of as many as it takes, and nobody asked for any of them"));
    }
}

/// Every descriptor of the queue is on offer at any time.
fn console(window: Window) -> Result<(), Error> {
    let device = Device::open(window, 0)?;
    // SAFETY: this is the only use of the rings.
    let [input, output] = unsafe { &mut *(&raw mut RINGS) };
    device.add_queue(0, input)?;
    let mut output = device.add_queue(TRANSMIT, output)?;
    device.begin()?;
    let text = [Buffer::read_by_device(TEXT.as_ptr(), TEXT.len())];
    (0..virtio::queue::SIZE).for_each(|first| output.offer(first, &text));
    loop {
        device.notify(TRANSMIT);
        while let Some((first, _)) = output.take_used() {
            output.offer(first, &text);
        }
    }
}
