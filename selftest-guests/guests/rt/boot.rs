//! From the loader's entry to Rust in ring 3.
//!
//! Three ways in: the 64-bit Linux boot protocol (`_start`, `rsi` = boot parameters), PVH
//! (`pvh_start`, 32-bit, `ebx` = start info) and a further CPU's start-up interrupt
//! ([`TRAMPOLINE`], 16-bit). All of them load the tables, set `SYSCALL` up, and leave for ring 3
//! with interrupts off.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use super::tables::{
    ALIAS, CODE32, FIRST_TSS, GDT, GDT_LOW, IDT, KERNEL_CODE, KERNEL_DATA, MAX_CPUS, PML4,
    USER_BASE, USER_CODE, USER_DATA,
};

/// Bytes of each CPU's ring 3 stack.
const STACK_SIZE: usize = 64 * 1024;

#[repr(C, align(16))]
struct Stacks([[u8; STACK_SIZE]; MAX_CPUS]);

static mut STACKS: Stacks = Stacks([[0; STACK_SIZE]; MAX_CPUS]);

/// How many CPUs have come this way.
static CPUS: AtomicU64 = AtomicU64::new(0);

/// Who handed the machine over.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Entry {
    /// A loader that follows the 64-bit Linux boot protocol.
    Linux64 = 0,
    /// A loader that follows PVH.
    Pvh = 1,
    /// The boot CPU, by a start-up interrupt.
    Startup = 2,
}

/// How many CPUs have reached ring 3 or are about to.
pub fn cpus() -> u64 {
    CPUS.load(Ordering::SeqCst)
}

/// The code that a further CPU starts with, in real mode. It may be copied to any page below 1 MiB.
pub fn trampoline() -> &'static [u8] {
    unsafe extern "C" {
        static trampoline_start: u8;
        static trampoline_end: u8;
    }
    let (start, end) = (&raw const trampoline_start, &raw const trampoline_end);
    // SAFETY: both symbols are in `.boot` below, the code lies between them.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY, as in Xen's public elfnote.h.
    ".pushsection .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad pvh_start",
    ".popsection",
    ".pushsection .boot, \"ax\"",
    // In: real mode, code segment = page of the trampoline.
    ".code16",
    ".globl trampoline_start",
    "trampoline_start:",
    "cli",
    "mov ax, cs",
    "mov ds, ax",
    // lgdt [trampoline_gdt], with a 32-bit base.
    ".byte 0x66, 0x0f, 0x01, 0x16",
    ".word trampoline_gdt - trampoline_start",
    "mov eax, cr0",
    "or al, 1",
    "mov cr0, eax",
    "mov edi, {startup}",
    ".byte 0x66, 0xea",
    ".long start32",
    ".word {code32}",
    "trampoline_gdt:",
    ".word 63",
    ".long {gdt_low_base}",
    ".globl trampoline_end",
    "trampoline_end:",
    ".code32",
    ".globl pvh_start",
    "pvh_start:",
    "cli",
    "mov edi, {pvh}",
    "mov esi, ebx",
    "lgdt [{gdt_low}]",
    ".byte 0xea",
    ".long start32",
    ".word {code32}",
    // In: protected mode with this image's GDT, `edi` = entry, `esi` = its parameter.
    "start32:",
    "mov ax, {kernel_data}",
    "mov ds, ax",
    "mov ss, ax",
    "mov es, ax",
    // PAE, OSFXSR, OSXMMEXCPT.
    "mov eax, 0x620",
    "mov cr4, eax",
    "mov eax, {pml4}",
    "mov cr3, eax",
    // EFER: LME, SCE.
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 0x101",
    "wrmsr",
    // PG, WP, NE, ET, MP, PE.
    "mov eax, 0x80010033",
    "mov cr0, eax",
    ".byte 0xea",
    ".long start64",
    ".word {kernel_code}",
    ".code64",
    ".globl _start",
    "_start:",
    "cli",
    "mov edi, {linux64}",
    "mov eax, 0x620",
    "mov cr4, rax",
    "mov eax, {pml4}",
    "mov cr3, rax",
    "mov eax, 0x80010033",
    "mov cr0, rax",
    "mov ecx, 0xc0000080",
    "rdmsr",
    "or eax, 1",
    "wrmsr",
    // In: long mode with this image's page tables, `edi` = entry, `rsi` = its parameter.
    "start64:",
    "lgdt [rip + {gdt}]",
    "lidt [rip + {idt}]",
    "mov ecx, 0xc0000081",
    "xor eax, eax",
    "mov edx, {star}",
    "wrmsr",
    "inc ecx",
    "lea rax, [rip + syscall_entry]",
    "mov edx, {alias_high}",
    "or eax, {alias_low}",
    "wrmsr",
    // SFMASK: IF, DF, TF, NT, AC.
    "mov ecx, 0xc0000084",
    "mov eax, 0x44700",
    "xor edx, edx",
    "wrmsr",
    "mov edx, 1",
    "lock xadd [rip + {cpus}], rdx",
    "mov eax, edx",
    "shl eax, 4",
    "add eax, {first_tss}",
    "ltr ax",
    "mov eax, {user_data}",
    "mov ds, eax",
    "mov es, eax",
    "lea ecx, [rdx + 1]",
    "imul ecx, ecx, {stack_size}",
    "lea r8, [rip + {stacks}]",
    "add rcx, r8",
    // The stack serves this one `iretq`, then ring 3.
    "mov rsp, rcx",
    "push rax",
    "push rcx",
    // The bit that is always 1.
    "push 2",
    "push {user_code}",
    "lea r8, [rip + ring3]",
    "push r8",
    "iretq",
    "ring3:",
    "xor ebp, ebp",
    "call {start}",
    "ud2",
    ".popsection",
    startup = const Entry::Startup as u32,
    pvh = const Entry::Pvh as u32,
    linux64 = const Entry::Linux64 as u32,
    code32 = const CODE32,
    kernel_code = const KERNEL_CODE,
    kernel_data = const KERNEL_DATA,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    first_tss = const FIRST_TSS,
    star = const (USER_BASE as u32) << 16 | KERNEL_CODE as u32,
    alias_high = const (ALIAS >> 32) as u32,
    alias_low = const ALIAS as u32,
    pml4 = const PML4,
    gdt_low_base = const super::tables::GDT_ADDRESS,
    gdt_low = sym GDT_LOW,
    gdt = sym GDT,
    idt = sym IDT,
    cpus = sym CPUS,
    stacks = sym STACKS,
    stack_size = const STACK_SIZE,
    start = sym super::start,
);
