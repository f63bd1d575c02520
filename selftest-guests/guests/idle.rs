//! Says one character on the serial port with its first instructions and then waits, with
//! interrupts off, until somebody ends it.
#![no_std]
#![no_main]

mod bare;

core::arch::global_asm!(
    ".pushsection .boot, \"ax\"",
    ".globl _start",
    "_start:",
    // The same bytes in 32-bit and in 64-bit mode.
    "cli",
    "mov dx, 0x3f8",
    "mov al, '.'",
    "out dx, al",
    "2:",
    "hlt",
    "jmp 2b",
    ".popsection",
);
