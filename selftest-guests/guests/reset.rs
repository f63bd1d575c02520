//! Resets the machine through the keyboard controller, with its first instructions.
#![no_std]
#![no_main]

mod bare;

core::arch::global_asm!(
    ".pushsection .boot, \"ax\"",
    ".globl _start",
    "_start:",
    // The same bytes in 32-bit and in 64-bit mode.
    "mov al, 0xfe",
    "out 0x64, al",
    "2:",
    "jmp 2b",
    ".popsection",
);
