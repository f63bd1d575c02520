//! The network device: frames in small receive buffers, put together and sent back, an interrupt
//! for each way.
//!
//! The guest first sends a frame of its own with its address, and then `net_frames=N` times what it
//! gets, with the addresses swapped. All frames are of the experimental Ethernet type; others are
//! let pass.
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{check, fail, ok};
use rt::{apic, cmdline, trap};
use virtio::queue::{Buffer, Queue, Ring};
use virtio::{Device, Error};

const DEVICE_ID: u32 = 1;
const MTU: u64 = 1 << 3;
const MAC: u64 = 1 << 5;
const MERGEABLE: u64 = 1 << 15;

const RX: u32 = 0;
const TX: u32 = 1;

const HEADER: usize = 12;
const ADDRESSES: usize = 12;
/// The type of the frames that are sent.
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];
const MAX_FRAME: usize = 1514;

/// A frame of the usual size takes three.
const BUFFER: usize = 600;
const BUFFERS: usize = 12;

static mut RX_RING: Ring = Ring::new();
static mut TX_RING: Ring = Ring::new();
static mut RECEIVED: [[u8; BUFFER]; BUFFERS] = [[0; BUFFER]; BUFFERS];
/// The frame being put together, and sent.
static mut FRAME: [u8; HEADER + MAX_FRAME] = [0; HEADER + MAX_FRAME];

struct Card {
    device: Device,
    receive: Queue,
    transmit: Queue,
}

fn main() {
    apic::enable();
    trap::enable_interrupts();
    let frames = cmdline::number("net_frames").unwrap_or(0);
    if let Err(error) = test(frames) {
        fail("network device", format_args!("{error}"));
    }
}

fn test(frames: u64) -> Result<(), Error> {
    let Some(window) = virtio::find(DEVICE_ID).next() else {
        fail("network device", format_args!("there is none"));
        return Ok(());
    };
    let device = Device::open(window, MTU | MAC | MERGEABLE)?;
    let offered = MTU | MAC | MERGEABLE;
    check("features", device.features & offered == offered, format_args!("{:#x}", device.features));
    // SAFETY: each ring is taken once.
    let receive = device.add_queue(RX, unsafe { &mut *(&raw mut RX_RING) })?;
    // SAFETY: as above.
    let transmit = device.add_queue(TX, unsafe { &mut *(&raw mut TX_RING) })?;
    device.begin()?;
    let mut card = Card { device, receive, transmit };
    for index in 0..BUFFERS {
        card.offer(index);
    }
    card.greet()?;
    for _ in 0..frames {
        let length = loop {
            match card.receive()? {
                Some(length) if kind() == EXPERIMENTAL => break length,
                Some(_) => {}
                None => {
                    fail("received frame", format_args!("its buffers make no frame"));
                    return Ok(());
                }
            }
        };
        swap_addresses();
        card.send(length)?;
    }
    ok("echo");
    check("reset", card.device.reset(), format_args!("it does not reset"));
    Ok(())
}

impl Card {
    fn offer(&mut self, index: usize) {
        // SAFETY: a place in memory that lives for ever.
        let buffer = unsafe { &raw mut RECEIVED[index] };
        self.receive.offer(index as u16, &[Buffer::written_by_device(buffer, BUFFER)]);
        self.device.notify(RX);
    }

    /// Sends a frame to everyone that says who this is.
    fn greet(&mut self) -> Result<(), Error> {
        let [low, mtu] = [self.device.config64(0), self.device.config64(8)];
        let mac = low.to_le_bytes();
        let mtu = (mtu.to_le_bytes()[2], mtu.to_le_bytes()[3]);
        for at in 0..6 {
            put(at, 0xff);
            put(6 + at, mac[at]);
        }
        put(ADDRESSES, EXPERIMENTAL[0]);
        put(ADDRESSES + 1, EXPERIMENTAL[1]);
        put(ADDRESSES + 2, mtu.0);
        put(ADDRESSES + 3, mtu.1);
        self.send(60)?;
        ok("greeting");
        Ok(())
    }

    /// Sends the frame and waits until it is gone.
    fn send(&mut self, length: usize) -> Result<(), Error> {
        // SAFETY: as in `offer`; the device is not using it.
        let frame = unsafe {
            (&raw mut FRAME).cast::<[u8; HEADER]>().write_volatile([0; HEADER]);
            &raw const FRAME
        };
        let header = Buffer::read_by_device(frame, HEADER);
        let rest = frame.cast::<u8>().wrapping_add(HEADER);
        self.transmit.offer(0, &[header, Buffer::read_by_device(rest, length)]);
        self.device.notify(TX);
        while self.transmit.take_used().is_none() {
            self.device.wait()?;
        }
        Ok(())
    }

    /// Puts the next frame together; its length, if the buffers are what the first of them says.
    fn receive(&mut self) -> Result<Option<usize>, Error> {
        let (first, written) = self.next_buffer()?;
        let count = u16::from_le_bytes([byte(first, 10), byte(first, 11)]);
        let Some(mut length) = (written as usize).checked_sub(HEADER) else { return Ok(None) };
        if count == 0 || usize::from(count) > BUFFERS || length > MAX_FRAME {
            return Ok(None);
        }
        (0..length).for_each(|at| put(at, byte(first, HEADER + at)));
        self.offer(first);
        for _ in 1..count {
            let (next, written) = self.next_buffer()?;
            let written = written as usize;
            if length + written > MAX_FRAME {
                return Ok(None);
            }
            (0..written).for_each(|at| put(length + at, byte(next, at)));
            length += written;
            self.offer(next);
        }
        Ok(Some(length))
    }

    fn next_buffer(&mut self) -> Result<(usize, u32), Error> {
        loop {
            if let Some((index, written)) = self.receive.take_used() {
                return Ok((usize::from(index), written));
            }
            // The host may take its time.
            match self.device.wait() {
                Ok(()) | Err(Error::NoInterrupt) => {}
                Err(error) => return Err(error),
            }
        }
    }
}

/// A byte of a receive buffer.
fn byte(buffer: usize, at: usize) -> u8 {
    // SAFETY: the device has used the buffer.
    unsafe { (&raw const RECEIVED[buffer % BUFFERS][at % BUFFER]).read_volatile() }
}

/// Sets a byte of the frame.
fn put(at: usize, value: u8) {
    // SAFETY: the device is not using the frame.
    unsafe { (&raw mut FRAME[HEADER + at % MAX_FRAME]).write_volatile(value) }
}

fn get(at: usize) -> u8 {
    // SAFETY: as in `put`.
    unsafe { (&raw const FRAME[HEADER + at]).read_volatile() }
}

fn kind() -> [u8; 2] {
    [get(ADDRESSES), get(ADDRESSES + 1)]
}

fn swap_addresses() {
    for at in 0..6 {
        let (to, from) = (get(at), get(6 + at));
        put(at, from);
        put(6 + at, to);
    }
}
