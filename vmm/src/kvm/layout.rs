//! Where things lie in the guest's physical address space and on its interrupt lines.
//!
//! | address | what |
//! | --- | --- |
//! | `0x500` | GDT |
//! | `0x6000` | PVH start info, module list, memory map |
//! | `0x7000` | zero page of the Linux boot protocol |
//! | `0x8ff0` | boot stack, downwards |
//! | `0x9000` to `0xeff8` | page tables of the 64-bit entry |
//! | `0x20000` | kernel command line |
//! | `0x9fc00` | MP table, in what a PC calls the extended BIOS data area |
//! | `0x100000` | kernel and beyond it free memory; the initrd at the top of low memory |
//! | `0xc0000000` | the hole: virtio-mmio windows, then what KVM and the interrupt controllers use |

/// Global descriptor table.
pub const GDT: u64 = 0x500;
/// PVH `hvm_start_info`.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6040;
/// PVH memory map.
pub const PVH_MEMORY_MAP: u64 = 0x6100;
/// Linux's `boot_params`.
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Top-level page table; the page directory pointer table is the next page, and the four page
/// directories, which map the first 4 GiB one to one, follow it.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// Longest command line, its terminating NUL included: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_MAX: usize = 2048;
/// MP floating pointer structure and configuration table; also the end of usable base memory.
pub const MP_TABLE: u64 = 0x9fc00;
/// End of the area in which the MP table lies.
pub const BASE_MEMORY_END: u64 = 0xa0000;
/// The lowest address at which a kernel may be loaded.
pub const KERNEL_START: u64 = 0x10_0000;

/// The first virtio-mmio window.
pub const MMIO_WINDOWS: u64 = 0xd000_0000;
/// Size of a virtio-mmio window in bytes.
pub const MMIO_WINDOW_SIZE: u64 = 0x1000;
/// Interrupt line of the first virtio-mmio window; each further one has the next line.
pub const FIRST_DEVICE_IRQ: u32 = 5;
/// The last interrupt line: the I/O APIC has 24.
pub const LAST_IRQ: u32 = 23;
/// How many virtio-mmio devices a machine can have: each has an interrupt line of its own.
pub const MAX_DEVICES: usize = (LAST_IRQ - FIRST_DEVICE_IRQ + 1) as usize;

/// Address of the virtio-mmio window number `index`, below [`MAX_DEVICES`].
pub fn window(index: usize) -> u64 {
    MMIO_WINDOWS + index as u64 * MMIO_WINDOW_SIZE
}

/// Interrupt line of the virtio-mmio window number `index`, below [`MAX_DEVICES`].
pub fn device_irq(index: usize) -> u32 {
    FIRST_DEVICE_IRQ + index as u32
}

/// I/O APIC registers.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APIC registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM uses on hosts whose processor can't run real mode in a guest.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM uses likewise.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The serial port's first I/O port; it has eight.
pub const SERIAL_PORT: u16 = 0x3f8;
/// The serial port's interrupt line.
pub const SERIAL_IRQ: u32 = 4;
