//! The I/O ports: the few by which a guest ends, and the serial port.
//!
//! What isn't there reads as all-ones and ignores writes, as on a PC's bus. That includes the
//! real-time clock: a guest gets its time from kvmclock.

use super::layout;
use super::serial::SerialPort;
use crate::config::{GuestEnd, POWER_OFF_PORT};

/// The keyboard controller's command and status port.
const I8042_COMMAND: u16 = 0x64;
/// The command that pulses the processor's reset line.
const PULSE_RESET: u8 = 0xfe;
const SERIAL_PORTS: std::ops::Range<u16> = layout::SERIAL_PORT..layout::SERIAL_PORT + 8;

/// A machine's I/O ports.
#[derive(Default)]
pub(super) struct Ports {
    /// At [`layout::SERIAL_PORT`], if the machine has one.
    pub serial: Option<SerialPort>,
}

impl Ports {
    /// A guest's `in`. `data` holds one or more reads of the same port.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        match (port, data) {
            // An empty buffer: whoever waits for room in it need not.
            (I8042_COMMAND, [status]) => *status = 0,
            (port, data) if SERIAL_PORTS.contains(&port) => {
                if let Some(serial) = &self.serial {
                    data.iter_mut()
                        .for_each(|byte| *byte = serial.read(port - layout::SERIAL_PORT));
                }
            }
            _ => {}
        }
    }

    /// A guest's `out`; says so if it ends the guest.
    pub fn write(&self, port: u16, data: &[u8]) -> Option<GuestEnd> {
        match (port, data) {
            (I8042_COMMAND, [PULSE_RESET]) => return Some(GuestEnd::Reset),
            (POWER_OFF_PORT, _) => return Some(GuestEnd::Shutdown),
            (port, data) if SERIAL_PORTS.contains(&port) => {
                if let Some(serial) = &self.serial {
                    data.iter().for_each(|byte| serial.write(port - layout::SERIAL_PORT, *byte));
                }
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_ends_by_two_ports_only() {
        let ports = Ports::default();
        assert_eq!(ports.write(0x64, &[0xfe]), Some(GuestEnd::Reset));
        assert_eq!(ports.write(0x64, &[0x60]), None);
        assert_eq!(ports.write(POWER_OFF_PORT, &[0]), Some(GuestEnd::Shutdown));
        assert_eq!(ports.write(0x80, &[1, 2]), None);
    }

    #[test]
    fn what_is_not_there_reads_as_all_ones() {
        let ports = Ports::default();
        let mut data = [0; 4];
        for port in [0x71, 0x3f8, 0x3fd, 0xcf8, 0xffff] {
            ports.read(port, &mut data);
            assert_eq!(data, [0xff; 4]);
        }
        let mut status = [1];
        ports.read(0x64, &mut status);
        assert_eq!(status, [0]);
    }
}
