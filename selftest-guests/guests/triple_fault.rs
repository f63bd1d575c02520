//! Faults with no interrupt table to find a handler in: the fault of the fault of a fault.
#![no_std]
#![no_main]

mod bare;

core::arch::global_asm!(
    ".pushsection .boot, \"ax\"",
    ".globl _start",
    "_start:",
    // The same bytes in 32-bit and in 64-bit mode: a descriptor of zeros on a stack of our own.
    "mov esp, offset stack_top",
    "push 0",
    "push 0",
    "lidt [rsp]",
    "ud2",
    ".popsection",
    ".pushsection .bss.stack, \"aw\", @nobits",
    ".balign 16",
    ".skip 256",
    "stack_top:",
    ".popsection",
);
