//! The interrupt controllers: the two old ones off, the local APIC and the I/O APIC on.

use super::port;

const LOCAL: u64 = 0xfee0_0000;
const ID: u64 = LOCAL + 0x20;
const SPURIOUS: u64 = LOCAL + 0xf0;
const COMMAND_LOW: u64 = LOCAL + 0x300;
const COMMAND_HIGH: u64 = LOCAL + 0x310;
const TIMER: u64 = LOCAL + 0x320;
const TIMER_COUNT: u64 = LOCAL + 0x380;
const TIMER_DIVIDE: u64 = LOCAL + 0x3e0;
const IO_SELECT: u64 = 0xfec0_0000;
const IO_WINDOW: u64 = 0xfec0_0010;

const SPURIOUS_VECTOR: u32 = 0xff;
const ENABLED: u32 = 1 << 8;
const ASSERT: u32 = 1 << 14;
const PENDING: u32 = 1 << 12;
const PERIODIC: u32 = 1 << 17;
const INIT: u32 = 5 << 8;
const STARTUP: u32 = 6 << 8;

/// Closes the two 8259s, whose vectors after a reset are those of exceptions.
pub fn mask_legacy_interrupts() {
    port::write8(0x21, 0xff);
    port::write8(0xa1, 0xff);
}

/// Switches this CPU's local APIC on.
pub fn enable() {
    write(SPURIOUS, ENABLED | SPURIOUS_VECTOR);
}

/// This CPU's APIC id.
pub fn id() -> u8 {
    (read(ID) >> 24) as u8
}

/// Sends this CPU an interrupt.
pub fn interrupt_self(vector: u8) {
    interrupt(id(), vector);
}

/// Sends a CPU an interrupt.
pub fn interrupt(id: u8, vector: u8) {
    command(id, ASSERT | u32::from(vector));
}

/// Starts another CPU at `page`, the number of a page below 1 MiB.
pub fn start_cpu(id: u8, page: u8) {
    command(id, ASSERT | INIT);
    super::time::pause(10_000_000);
    command(id, ASSERT | STARTUP | u32::from(page));
    super::time::pause(1_000_000);
    command(id, ASSERT | STARTUP | u32::from(page));
}

/// Has the timer interrupt this CPU once, after `count` ticks of its bus.
pub fn start_timer(vector: u8, count: u32) {
    write(TIMER_DIVIDE, 0b1011);
    write(TIMER, u32::from(vector));
    write(TIMER_COUNT, count);
}

/// Has the timer interrupt this CPU again and again, each `count` ticks of its bus.
pub fn start_periodic_timer(vector: u8, count: u32) {
    write(TIMER_DIVIDE, 0b1011);
    write(TIMER, PERIODIC | u32::from(vector));
    write(TIMER_COUNT, count);
}

/// Routes an edge of an interrupt line to this CPU.
pub fn route(line: u8, vector: u8) {
    write_io(0x11 + 2 * line, u32::from(id()) << 24);
    write_io(0x10 + 2 * line, u32::from(vector));
}

fn command(to: u8, command: u32) {
    while read(COMMAND_LOW) & PENDING != 0 {
        core::hint::spin_loop();
    }
    write(COMMAND_HIGH, u32::from(to) << 24);
    write(COMMAND_LOW, command);
}

fn write_io(register: u8, value: u32) {
    write(IO_SELECT, register.into());
    write(IO_WINDOW, value);
}

fn read(register: u64) -> u32 {
    // SAFETY: a register of an interrupt controller, which every machine here has.
    unsafe { (register as *const u32).read_volatile() }
}

fn write(register: u64, value: u32) {
    // SAFETY: as above.
    unsafe { (register as *mut u32).write_volatile(value) }
}
