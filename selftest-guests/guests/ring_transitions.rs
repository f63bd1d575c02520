//! Can ring 3 be interrupted, and call ring 0, as a kernel's user space must?
//!
//! Provokes exceptions in ring 3 and checks what ring 0 was told, takes a software interrupt, an
//! interrupt from its own local APIC and one from that APIC's timer, and calls `SYSCALL`, whose
//! handler lies in memory that is closed to ring 3, many times over.
#![no_std]
#![no_main]

mod rt;

use core::arch::asm;

use rt::report::{check, fail, ok};
use rt::tables::ALIAS;
use rt::{apic, time, trap};

const INTERRUPT_VECTOR: u8 = 0x41;
const TIMER_VECTOR: u8 = 0x42;
const SYSCALLS: u64 = 100;

const DIVIDE_ERROR: u64 = 0;
const INVALID_OPCODE: u64 = 6;
const GENERAL_PROTECTION: u64 = 13;
const PAGE_FAULT: u64 = 14;

/// An address that is mapped nowhere.
const NOWHERE: u64 = 0x40_0000_0000;

fn main() {
    exceptions();
    interrupts();
    syscalls();
}

fn exceptions() {
    let exception = provoke!("xor edx, edx", "xor ecx, ecx", "div ecx");
    expect("divide error", exception, DIVIDE_ERROR, None);

    let exception = provoke!("ud2");
    expect("invalid opcode", exception, INVALID_OPCODE, None);

    let exception = provoke!("hlt");
    expect("privileged instruction", exception, GENERAL_PROTECTION, Some((0, None)));

    let exception = provoke!("mov rax, [rcx]"; in("rcx") NOWHERE);
    expect("page fault on read", exception, PAGE_FAULT, Some((0b100, Some(NOWHERE))));

    let exception = provoke!("mov [rcx], rax"; in("rcx") NOWHERE);
    expect("page fault on write", exception, PAGE_FAULT, Some((0b110, Some(NOWHERE))));

    let exception = provoke!("mov rax, [rcx]"; in("rcx") ALIAS);
    expect("page fault on ring 0's memory", exception, PAGE_FAULT, Some((0b101, Some(ALIAS))));
}

/// Checks an exception: its vector, that it came from ring 3, its error code, the address.
fn expect(
    name: &str,
    exception: Option<trap::Exception>,
    vector: u64,
    details: Option<(u64, Option<u64>)>,
) {
    let Some(found) = exception else {
        return fail(name, format_args!("nothing happened"));
    };
    let (error_code, address) = details.unwrap_or((0, None));
    let right = found.vector == vector
        && found.cs & 3 == 3
        && found.error_code == error_code
        && address.is_none_or(|address| address == found.cr2);
    check(
        name,
        right,
        format_args!(
            "vector {} error {:#x} cs {:#x} cr2 {:#x} at {:#x}",
            found.vector, found.error_code, found.cs, found.cr2, found.rip
        ),
    );
}

fn interrupts() {
    trap::enable_interrupts();
    ok("breakpoint");

    apic::enable();
    apic::interrupt_self(INTERRUPT_VECTOR);
    let came = time::wait_until(|| trap::interrupts(INTERRUPT_VECTOR) == 1);
    check("interrupt from the local APIC", came, format_args!("it did not come"));

    apic::start_timer(TIMER_VECTOR, 10_000);
    let came = time::wait_until(|| trap::interrupts(TIMER_VECTOR) == 1);
    check("interrupt from the timer", came, format_args!("it did not come"));

    trap::disable_interrupts();
    apic::interrupt_self(INTERRUPT_VECTOR);
    time::pause(1_000_000);
    let held = trap::interrupts(INTERRUPT_VECTOR) == 1;
    trap::enable_interrupts();
    let came = time::wait_until(|| trap::interrupts(INTERRUPT_VECTOR) == 2);
    check("interrupts held back", held && came, format_args!("held {held}, then came {came}"));
    trap::disable_interrupts();
}

fn syscalls() {
    for number in 1..=SYSCALLS {
        let exception = provoke!("syscall");
        let (count, cs) = trap::syscalls();
        if let Some(exception) = exception {
            return fail(
                "syscall",
                format_args!(
                    "vector {} error {:#x} cs {:#x} at {:#x} instead of the handler in ring 0",
                    exception.vector, exception.error_code, exception.cs, exception.rip
                ),
            );
        }
        let ring3: u64;
        // SAFETY: reads a register.
        unsafe { asm!("mov {}, cs", out(reg) ring3, options(nomem, nostack)) };
        if count != number || cs & 3 != 0 || ring3 & 3 != 3 {
            return fail(
                "syscall",
                format_args!("{count} of {number} calls; handler's cs {cs:#x}, then {ring3:#x}"),
            );
        }
    }
    ok("syscall");
}
