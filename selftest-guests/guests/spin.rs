//! Runs until somebody ends it: says so on the serial port, then spins with its interrupts off.
#![no_std]
#![no_main]

mod rt;

fn main() {
    rt::report::ok("spinning");
    loop {
        core::hint::spin_loop();
    }
}
