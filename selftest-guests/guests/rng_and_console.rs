//! The entropy device and the virtio console.
//!
//! Draws entropy twice; says a line on the console, then echoes one line that the host types, if
//! the word `echo` is on the command line.
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{check, fail, ok};
use rt::{apic, cmdline, trap};
use virtio::queue::{Buffer, Queue, Ring};
use virtio::{Device, Error, Window};

const CONSOLE: u32 = 3;
const RNG: u32 = 4;

const GREETING: &[u8] = b"hello from the guest\n";

static mut RNG_RING: Ring = Ring::new();
static mut CONSOLE_RINGS: [Ring; 2] = [const { Ring::new() }; 2];
static mut ENTROPY: [[u8; 64]; 2] = [[0; 64]; 2];
static mut LINE: [u8; 128] = [0; 128];

fn main() {
    apic::enable();
    trap::enable_interrupts();
    for window in virtio::find(RNG).take(1) {
        if let Err(error) = rng(window) {
            fail("rng", format_args!("{error}"));
        }
    }
    for window in virtio::find(CONSOLE).take(1) {
        if let Err(error) = console(window) {
            fail("console", format_args!("{error}"));
        }
    }
}

fn rng(window: Window) -> Result<(), Error> {
    let mut device = Device::open(window, 0)?;
    // SAFETY: this is the only use of the ring.
    let mut queue = device.add_queue(0, unsafe { &mut *(&raw mut RNG_RING) })?;
    device.begin()?;
    for buffer in 0..2 {
        // SAFETY: a place of its own.
        let place = unsafe { &raw mut ENTROPY[buffer] };
        queue.offer(0, &[Buffer::written_by_device(place, 64)]);
        let written = complete(&mut device, &mut queue, 0)?;
        check("entropy", (1..=64).contains(&written), format_args!("{written} bytes"));
    }
    // SAFETY: the device is done with both.
    let [first, second] = unsafe { (&raw const ENTROPY).read_volatile() };
    check("entropy differs", first != second, format_args!("the same twice"));
    Ok(())
}

fn console(window: Window) -> Result<(), Error> {
    let mut device = Device::open(window, 0)?;
    // SAFETY: this is the only use of the rings.
    let [input, output] = unsafe { &mut *(&raw mut CONSOLE_RINGS) };
    let mut input = device.add_queue(0, input)?;
    let mut output = device.add_queue(1, output)?;
    device.begin()?;
    say(&mut device, &mut output, GREETING.as_ptr(), GREETING.len())?;
    ok("console output");
    if !cmdline::words().any(|word| word == "echo") {
        return Ok(());
    }
    loop {
        let line = &raw mut LINE;
        input.offer(0, &[Buffer::written_by_device(line, 128)]);
        let written = complete(&mut device, &mut input, 0)? as usize;
        if !(1..=128).contains(&written) {
            fail("console input", format_args!("{written} bytes"));
            return Ok(());
        }
        say(&mut device, &mut output, line.cast(), written)?;
        // SAFETY: the device is done with it.
        let last = unsafe { line.cast::<u8>().add(written - 1).read_volatile() };
        if last == b'\n' {
            ok("console input");
            return Ok(());
        }
    }
}

fn say(device: &mut Device, queue: &mut Queue, text: *const u8, count: usize) -> Result<(), Error> {
    queue.offer(0, &[Buffer::read_by_device(text, count)]);
    complete(device, queue, 1)?;
    Ok(())
}

/// Rings the doorbell and waits until the device has used one chain; how much it wrote there.
fn complete(device: &mut Device, queue: &mut Queue, index: u32) -> Result<u32, Error> {
    device.notify(index);
    loop {
        match queue.take_used() {
            Some((_, written)) => return Ok(written),
            None => device.wait()?,
        }
    }
}
