//! Block devices: reads, writes, flushes, several requests at a time, an interrupt for each, and
//! requests that must be refused.
//!
//! Every 8-byte word of a disk holds its own number when the guest starts. The guest writes only to
//! the second half, and there it leaves the complement of each word's number in all sectors that it
//! wrote: the first [`WRITTEN_SECTORS`] of that half. A disk that is read-only stays as it is.
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{check, fail};
use rt::{apic, trap};
use virtio::queue::{Buffer, Queue, Ring};
use virtio::{Device, Error, Window};

const DEVICE_ID: u32 = 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_CACHE: u32 = 4;
const UNKNOWN: u32 = 99;

const STATUS_OK: u8 = 0;
const STATUS_ERROR: u8 = 1;
const STATUS_UNSUPPORTED: u8 = 2;
/// What no device answers: it did not write a status.
const NO_STATUS: u8 = 0xee;

const SECTOR: usize = 512;
const WORDS: usize = SECTOR / 8;
/// How many sectors of the second half are written, one at a time.
const WRITTEN_SECTORS: u64 = 64;
/// How many requests are under way at a time; each takes three descriptors.
const BATCH: usize = 5;

#[derive(Clone, Copy)]
#[repr(C)]
struct Header {
    kind: u32,
    reserved: u32,
    sector: u64,
}

#[derive(Clone, Copy)]
#[repr(C, align(16))]
struct Request {
    header: Header,
    data: [u64; WORDS],
    status: u8,
}

const EMPTY: Request = Request {
    header: Header { kind: 0, reserved: 0, sector: 0 },
    data: [0; WORDS],
    status: NO_STATUS,
};

const MAX_DISKS: usize = 4;
static mut RINGS: [Ring; MAX_DISKS] = [const { Ring::new() }; MAX_DISKS];
static mut REQUESTS: [Request; BATCH] = [EMPTY; BATCH];

struct Disk {
    device: Device,
    queue: Queue,
    sectors: u64,
}

fn main() {
    apic::enable();
    trap::enable_interrupts();
    let mut disks = 0;
    for (index, window) in virtio::find(DEVICE_ID).take(MAX_DISKS).enumerate() {
        disks += 1;
        if let Err(error) = test(window, index) {
            fail("disk", format_args!("{error}"));
        }
    }
    if disks == 0 {
        fail("disk", format_args!("there is none"));
    }
}

fn test(window: Window, index: usize) -> Result<(), Error> {
    let device = Device::open(window, READ_ONLY | FLUSH)?;
    // SAFETY: each disk takes its own ring, once.
    let queue = device.add_queue(0, unsafe { &mut *(&raw mut RINGS[index]) })?;
    device.begin()?;
    let sectors = device.config64(0);
    let read_only = device.features & READ_ONLY != 0;
    let mut disk = Disk { device, queue, sectors };
    check("capacity", sectors >= 4 * WRITTEN_SECTORS, format_args!("{sectors} sectors"));

    disk.read_untouched()?;
    disk.refused()?;
    if read_only {
        let status = disk.one(OUT, 0)?;
        check("write to a read-only disk", status == STATUS_ERROR, format_args!("{status}"));
    } else {
        disk.write_and_read()?;
        disk.flush()?;
    }
    disk.read_batches()?;
    check("reset", disk.device.reset(), format_args!("it does not reset"));
    Ok(())
}

impl Disk {
    fn read_untouched(&mut self) -> Result<(), Error> {
        for sector in [0, 1, self.sectors / 2 - 1] {
            let status = self.one(IN, sector)?;
            let right = status == STATUS_OK && holds(sector, |number| number);
            check("read", right, format_args!("sector {sector}, status {status}"));
        }
        Ok(())
    }

    fn refused(&mut self) -> Result<(), Error> {
        for sector in [self.sectors, u64::MAX, u64::MAX / SECTOR as u64 + 1] {
            let status = self.one(IN, sector)?;
            let right = status == STATUS_ERROR;
            check("read past the end", right, format_args!("sector {sector}, status {status}"));
        }
        let status = self.one(UNKNOWN, 0)?;
        let right = status == STATUS_UNSUPPORTED;
        check("unknown request", right, format_args!("status {status}"));
        Ok(())
    }

    fn write_and_read(&mut self) -> Result<(), Error> {
        let half = self.sectors / 2;
        for sector in half..half + WRITTEN_SECTORS {
            fill(sector, |number| !number);
            let status = self.one(OUT, sector)?;
            if status != STATUS_OK {
                fail("write", format_args!("sector {sector}, status {status}"));
            }
        }
        for sector in half..half + WRITTEN_SECTORS {
            fill(sector, |_| 0);
            let status = self.one(IN, sector)?;
            if status != STATUS_OK || !holds(sector, |number| !number) {
                fail("read of what was written", format_args!("sector {sector}, {status}"));
            }
        }
        rt::report::ok("write and read");
        Ok(())
    }

    fn flush(&mut self) -> Result<(), Error> {
        let offered = self.device.features & FLUSH != 0;
        check("flush feature", offered, format_args!("it is not offered"));
        let status = self.one(FLUSH_CACHE, 0)?;
        check("flush", status == STATUS_OK, format_args!("status {status}"));
        Ok(())
    }

    /// Several reads under way at a time, with as many interrupts as the device likes.
    fn read_batches(&mut self) -> Result<(), Error> {
        for batch in 0..16 {
            for slot in 0..BATCH {
                self.offer(slot, IN, batch + slot as u64 * 7);
            }
            self.device.notify(0);
            let mut left = BATCH;
            while left > 0 {
                match self.queue.take_used() {
                    Some(_) => left -= 1,
                    None => self.device.wait()?,
                }
            }
            for slot in 0..BATCH {
                let sector = batch + slot as u64 * 7;
                let (status, right) = (status(slot), holds_in(slot, sector, |number| number));
                if status != STATUS_OK || !right {
                    fail("reads at a time", format_args!("sector {sector}, status {status}"));
                }
            }
        }
        rt::report::ok("reads at a time");
        Ok(())
    }

    /// One request with the first slot's data, until it is done. Its status.
    fn one(&mut self, kind: u32, sector: u64) -> Result<u8, Error> {
        self.offer(0, kind, sector);
        self.device.notify(0);
        while self.queue.take_used().is_none() {
            self.device.wait()?;
        }
        Ok(status(0))
    }

    fn offer(&mut self, slot: usize, kind: u32, sector: u64) {
        // SAFETY: the device has used whatever was offered from this slot before.
        let request = unsafe { &raw mut REQUESTS[slot] };
        // SAFETY: as above.
        let [header, data, status] = unsafe {
            (*request).header = Header { kind, reserved: 0, sector };
            (*request).status = NO_STATUS;
            let data = (&raw mut (*request).data).cast::<u8>();
            [
                Buffer::read_by_device(&raw const (*request).header, size_of::<Header>()),
                match kind {
                    OUT => Buffer::read_by_device(data, SECTOR),
                    _ => Buffer::written_by_device(data, SECTOR),
                },
                Buffer::written_by_device(&raw mut (*request).status, 1),
            ]
        };
        let first = slot as u16 * 3;
        match kind {
            FLUSH_CACHE => self.queue.offer(first, &[header, status]),
            _ => self.queue.offer(first, &[header, data, status]),
        }
    }
}

fn status(slot: usize) -> u8 {
    // SAFETY: the device has used the request.
    unsafe { (&raw const REQUESTS[slot].status).read_volatile() }
}

/// Fills the first slot with a value for each word's number on the disk.
fn fill(sector: u64, value: impl Fn(u64) -> u64) {
    for word in 0..WORDS {
        // SAFETY: no request is under way.
        unsafe {
            let to = &raw mut REQUESTS[0].data[word];
            to.write_volatile(value(sector * WORDS as u64 + word as u64));
        }
    }
}

fn holds(sector: u64, value: impl Fn(u64) -> u64) -> bool {
    holds_in(0, sector, value)
}

fn holds_in(slot: usize, sector: u64, value: impl Fn(u64) -> u64) -> bool {
    (0..WORDS).all(|word| {
        // SAFETY: the device has used the request.
        let found = unsafe { (&raw const REQUESTS[slot].data[word]).read_volatile() };
        found == value(sector * WORDS as u64 + word as u64)
    })
}
