//! Runs until somebody ends it: says one character on the serial port, then spins.
#![no_std]
#![no_main]

mod rt;

fn main() {
    rt::report::ok("spinning");
    loop {
        core::hint::spin_loop();
    }
}
