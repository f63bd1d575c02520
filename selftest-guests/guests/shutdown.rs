//! Switches the machine off with its first instructions, in ring 0.
#![no_std]
#![no_main]

mod bare;

core::arch::global_asm!(
    ".pushsection .boot, \"ax\"",
    ".globl _start",
    "_start:",
    // The same bytes in 32-bit and in 64-bit mode.
    "mov dx, 0x501",
    "out dx, al",
    "2:",
    "jmp 2b",
    ".popsection",
);
