//! What a guest says, a line each on the first serial port: `ok NAME`, `FAIL NAME: reason`, or
//! `NAME KEY=VALUE ...` for a measurement.

use core::fmt::{Arguments, Write};

use super::port;

const SERIAL_DATA: u16 = 0x3f8;
/// A write to this port switches the machine off (`kiln_vmm::config::POWER_OFF_PORT`).
const POWER_OFF: u16 = 0x501;

/// The transmitter, which is taken to be always ready: the serial ports of virtual machines are.
struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> core::fmt::Result {
        for byte in text.bytes() {
            port::write8(SERIAL_DATA, byte);
        }
        Ok(())
    }
}

/// Writes a line.
pub fn line(text: Arguments<'_>) {
    // Writing to the serial port never fails.
    let _ = writeln!(Serial, "{text}");
}

/// Says that a check passed.
pub fn ok(name: &str) {
    line(format_args!("ok {name}"));
}

/// Says that a check failed, and why.
pub fn fail(name: &str, reason: Arguments<'_>) {
    line(format_args!("FAIL {name}: {reason}"));
}

/// Says how a check went.
pub fn check(name: &str, passed: bool, reason: Arguments<'_>) {
    if passed { ok(name) } else { fail(name, reason) }
}

/// Switches the machine off.
pub fn power_off() -> ! {
    port::write8(POWER_OFF, 0);
    loop {
        core::hint::spin_loop();
    }
}
