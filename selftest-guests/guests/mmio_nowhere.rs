//! What is where nothing is? Device memory and ports that no device answers for read as ones, and
//! take writes without effect.
#![no_std]
#![no_main]

mod rt;

use rt::port;
use rt::report::check;

/// In the gap below 4 GiB, far from any device.
const NOWHERE: u64 = 0xdf00_0000;
const NO_PORT: u16 = 0x5f0;

fn main() {
    // SAFETY: no memory of the guest's lies there.
    let (byte, short, long, quad) = unsafe {
        (
            (NOWHERE as *const u8).add(1).read_volatile(),
            (NOWHERE as *const u16).add(1).read_volatile(),
            (NOWHERE as *const u32).add(1).read_volatile(),
            (NOWHERE as *const u64).add(1).read_volatile(),
        )
    };
    check("byte", byte == u8::MAX, format_args!("{byte:#x}"));
    check("two bytes", short == u16::MAX, format_args!("{short:#x}"));
    check("four bytes", long == u32::MAX, format_args!("{long:#x}"));
    check("eight bytes", quad == u64::MAX, format_args!("{quad:#x}"));

    // SAFETY: as above.
    let after = unsafe {
        (NOWHERE as *mut u64).write_volatile(0);
        (NOWHERE as *const u64).read_volatile()
    };
    check("write", after == u64::MAX, format_args!("{after:#x}"));

    let (byte, long) = (port::read8(NO_PORT), port::read32(NO_PORT));
    check("port", byte == u8::MAX && long == u32::MAX, format_args!("{byte:#x} {long:#x}"));
}
