//! The balloon's reports of free memory.
//!
//! Reports the middle of an array of pages, finds it empty and the rest as it was, and uses it again.
#![no_std]
#![no_main]

mod rt;
mod virtio;

use rt::report::{check, fail};
use rt::{apic, trap};
use virtio::queue::{Buffer, Ring};
use virtio::{Device, Error, Window};

const BALLOON: u32 = 5;
/// `VIRTIO_BALLOON_F_REPORTING`, and the queue that comes with it where no other feature has one.
const REPORTING: u64 = 1 << 5;
const REPORTS: u32 = 2;

const PAGE: usize = 4096;
const PAGES: usize = 16;
const FIRST: usize = 4;
const COUNT: usize = 8;

#[repr(C, align(4096))]
struct Pages([[u8; PAGE]; PAGES]);

static mut RING: Ring = Ring::new();
static mut MEMORY: Pages = Pages([[0; PAGE]; PAGES]);

fn main() {
    apic::enable();
    trap::enable_interrupts();
    for window in virtio::find(BALLOON).take(1) {
        if let Err(error) = report(window) {
            fail("balloon", format_args!("{error}"));
        }
    }
}

fn report(window: Window) -> Result<(), Error> {
    let mut device = Device::open(window, REPORTING)?;
    check("reporting is offered", device.features & REPORTING != 0, format_args!("it isn't"));
    // SAFETY: this is the only use of the ring.
    let mut queue = device.add_queue(REPORTS, unsafe { &mut *(&raw mut RING) })?;
    device.begin()?;
    (0..PAGES).for_each(|page| set(page, 0xaa));
    // SAFETY: a place within the array.
    let free = unsafe { &raw mut MEMORY.0[FIRST] };
    queue.offer(0, &[Buffer::written_by_device(free, COUNT * PAGE)]);
    device.notify(REPORTS);
    let written = loop {
        match queue.take_used() {
            Some((_, written)) => break written,
            None => device.wait()?,
        }
    };
    check("nothing is written", written == 0, format_args!("{written} bytes"));
    for page in 0..PAGES {
        let free = (FIRST..FIRST + COUNT).contains(&page);
        let (expected, found) = (if free { 0 } else { 0xaa }, get(page));
        check("page", found == expected, format_args!("{page} has {found:#x}"));
    }
    set(FIRST, 0x55);
    check("page is used again", get(FIRST) == 0x55, format_args!("{:#x}", get(FIRST)));
    Ok(())
}

fn set(page: usize, value: u8) {
    // SAFETY: a byte within the array, which nobody refers to.
    unsafe { (&raw mut MEMORY.0[page][PAGE / 2]).write_volatile(value) }
}

fn get(page: usize) -> u8 {
    // SAFETY: as above.
    unsafe { (&raw const MEMORY.0[page][PAGE / 2]).read_volatile() }
}
