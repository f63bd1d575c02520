//! The processor's tables: paging, segments, task state, interrupts.
//!
//! They lie at fixed addresses at the front of the image (`guest.ld`), so all of them are made when
//! the guest is compiled and ring 0, which some hosts emulate slowly, has nothing to compute.
//!
//! Memory as the guest sees it: the first and the fourth GiB mapped one to one and open to ring 3,
//! and the first GiB a second time at [`ALIAS`], closed to ring 3. Everything that ring 0 runs is
//! entered at the alias, as a kernel's code would be: reaching it without the privilege of ring 0
//! is a page fault.

use core::mem::{offset_of, size_of};

/// Where the image is loaded.
const IMAGE: u64 = 0x20_0000;
/// Where the first GiB is mapped a second time, for ring 0 alone.
pub const ALIAS: u64 = 0xffff_ffff_8000_0000;
/// The entry stubs of all vectors, one each [`STUB_SIZE`] bytes: `.stubs`.
const STUBS: u64 = IMAGE + size_of::<Tables>() as u64;
/// Bytes from one entry stub to the next.
pub const STUB_SIZE: u64 = 16;
/// By which ring 3 asks a service of ring 0: the breakpoint's (`INT3`). The other software
/// interrupts do not get through on hosts that emulate privileged instructions.
pub const SERVICE_VECTOR: usize = 3;

/// The most CPUs that a guest can start.
pub const MAX_CPUS: usize = 32;
/// The first ports, which are open to ring 3 by the I/O permission map. (Not by the I/O privilege
/// level: a host that runs ring 0 in software may lose that in `IRET`.)
const OPEN_PORTS: usize = 0x600;
/// Bytes of each CPU's ring 0 stack.
const STACK_SIZE: usize = 1024;

/// 32-bit code of ring 0, on the way to long mode.
pub const CODE32: u16 = 0x08;
/// Code of ring 0. `SYSCALL` wants [`KERNEL_DATA`] behind it.
pub const KERNEL_CODE: u16 = 0x10;
/// Data and stack of ring 0.
pub const KERNEL_DATA: u16 = 0x18;
/// What `SYSRET` counts from: data at +8, 64-bit code at +16.
pub const USER_BASE: u16 = 0x20 | 3;
/// Data and stack of ring 3.
pub const USER_DATA: u16 = 0x28 | 3;
/// Code of ring 3.
pub const USER_CODE: u16 = 0x30 | 3;
/// The first CPU's task state segment; each takes two slots.
pub const FIRST_TSS: u16 = 0x40;
const FIXED_SLOTS: usize = FIRST_TSS as usize / 8;

const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const LARGE: u64 = 1 << 7;
const OPEN: u64 = PRESENT | WRITABLE | USER;
const CLOSED: u64 = PRESENT | WRITABLE;

type Page = [u64; 512];

/// Everything at the front of the image.
#[repr(C, align(4096))]
pub struct Tables {
    pub pml4: Page,
    low: Page,
    alias: Page,
    first_gib: Page,
    fourth_gib: Page,
    idt: [[u64; 2]; 256],
    gdt: [u64; FIXED_SLOTS + 2 * MAX_CPUS],
    tss: [Tss; MAX_CPUS],
    open_ports: [u8; OPEN_PORTS / 8],
    ports_end: [u8; 8],
    stacks: [[u8; STACK_SIZE]; MAX_CPUS],
}

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Tss {
    reserved: u32,
    rsp0: u64,
    rest: [u16; 45],
    io_map_base: u16,
}

/// What `lgdt` and `lidt` load.
#[repr(C, packed)]
pub struct Descriptor {
    limit: u16,
    base: u64,
}

#[unsafe(link_section = ".tables")]
#[used]
static mut TABLES: Tables = Tables {
    pml4: {
        let mut page = [0; 512];
        page[0] = address(offset_of!(Tables, low)) | OPEN;
        page[511] = address(offset_of!(Tables, alias)) | CLOSED;
        page
    },
    low: {
        let mut page = [0; 512];
        page[0] = address(offset_of!(Tables, first_gib)) | OPEN;
        page[3] = address(offset_of!(Tables, fourth_gib)) | OPEN;
        page
    },
    alias: {
        let mut page = [0; 512];
        page[510] = address(offset_of!(Tables, first_gib)) | CLOSED;
        page
    },
    first_gib: gib(0),
    fourth_gib: gib(3),
    idt: idt(),
    gdt: gdt(),
    tss: tss(),
    open_ports: [0; OPEN_PORTS / 8],
    ports_end: [0xff; 8],
    stacks: [[0; STACK_SIZE]; MAX_CPUS],
};

/// The descriptor of the segment table. Of the alias, so that ring 3 is kept from it.
pub static GDT: Descriptor = Descriptor {
    limit: size_of::<[u64; FIXED_SLOTS + 2 * MAX_CPUS]>() as u16 - 1,
    base: ALIAS + address(offset_of!(Tables, gdt)),
};
/// The same, at the address by which code without paging reaches it.
pub static GDT_LOW: Descriptor = Descriptor {
    limit: size_of::<[u64; FIXED_SLOTS + 2 * MAX_CPUS]>() as u16 - 1,
    base: address(offset_of!(Tables, gdt)),
};
/// The descriptor of the interrupt table.
pub static IDT: Descriptor = Descriptor {
    limit: size_of::<[[u64; 2]; 256]>() as u16 - 1,
    base: ALIAS + address(offset_of!(Tables, idt)),
};
/// Where the segment table lies, for a descriptor below 1 MiB.
pub const GDT_ADDRESS: u64 = address(offset_of!(Tables, gdt));
/// Where the page tables are rooted.
pub const PML4: u64 = address(offset_of!(Tables, pml4));

const fn address(offset: usize) -> u64 {
    IMAGE + offset as u64
}

const fn gib(number: u64) -> Page {
    let mut page = [0; 512];
    let mut index = 0;
    while index < 512 {
        page[index] = (number << 30) + ((index as u64) << 21) | OPEN | LARGE;
        index += 1;
    }
    page
}

/// Interrupt gates to the stubs; only the service's may be called from ring 3.
const fn idt() -> [[u64; 2]; 256] {
    let mut gates = [[0; 2]; 256];
    let mut vector = 0;
    while vector < 256 {
        let stub = ALIAS + STUBS + vector as u64 * STUB_SIZE;
        let kind: u64 = if vector == SERVICE_VECTOR { 0xee } else { 0x8e };
        gates[vector][0] =
            (stub & 0xffff) | (KERNEL_CODE as u64) << 16 | kind << 40 | (stub >> 16 & 0xffff) << 48;
        gates[vector][1] = stub >> 32;
        vector += 1;
    }
    gates
}

const fn gdt() -> [u64; FIXED_SLOTS + 2 * MAX_CPUS] {
    let mut slots = [0; FIXED_SLOTS + 2 * MAX_CPUS];
    slots[1] = 0x00cf_9b00_0000_ffff;
    slots[2] = 0x00af_9b00_0000_ffff;
    slots[3] = 0x00cf_9300_0000_ffff;
    slots[4] = 0x00cf_fb00_0000_ffff;
    slots[5] = 0x00cf_f300_0000_ffff;
    slots[6] = 0x00af_fb00_0000_ffff;
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        let base = ALIAS + address(offset_of!(Tables, tss) + cpu * size_of::<Tss>());
        slots[FIXED_SLOTS + 2 * cpu] = (ports_from(cpu) + OPEN_PORTS / 8) as u64
            | (base & 0xff_ffff) << 16
            | 0x89 << 40
            | (base >> 24 & 0xff) << 56;
        slots[FIXED_SLOTS + 2 * cpu + 1] = base >> 32;
        cpu += 1;
    }
    slots
}

/// Where the I/O permission map is, from a CPU's task state segment: one map serves all.
const fn ports_from(cpu: usize) -> usize {
    offset_of!(Tables, open_ports) - offset_of!(Tables, tss) - cpu * size_of::<Tss>()
}

const fn tss() -> [Tss; MAX_CPUS] {
    let empty = Tss { reserved: 0, rsp0: 0, rest: [0; 45], io_map_base: 0 };
    let mut all = [empty; MAX_CPUS];
    let mut cpu = 0;
    while cpu < MAX_CPUS {
        all[cpu].rsp0 = ALIAS + address(offset_of!(Tables, stacks) + (cpu + 1) * STACK_SIZE);
        all[cpu].io_map_base = ports_from(cpu) as u16;
        cpu += 1;
    }
    all
}
