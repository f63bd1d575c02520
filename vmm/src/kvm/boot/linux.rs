//! What a kernel finds that is entered by the 64-bit Linux boot protocol
//! (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"; zero-page.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::GuestAddress;

use super::{BootError, Initrd, memory_map};
use crate::GuestMemory;
use crate::kvm::layout;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
/// `boot_flag`, `header` and `version` of a setup header, protocol 2.15.
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
const PROTOCOL_VERSION: u16 = 0x20f;
/// A loader without an id of its own.
const LOADER_UNDEFINED: u8 = 0xff;

/// Writes the zero page.
pub(super) fn write(
    memory: &GuestMemory,
    initrd: Option<Initrd>,
    cmdline_length: usize,
) -> Result<(), BootError> {
    let mut params = boot_params::default();
    params.hdr.boot_flag = BOOT_FLAG;
    params.hdr.header = HEADER_MAGIC;
    params.hdr.version = PROTOCOL_VERSION;
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline_length as u32;
    if let Some(initrd) = initrd {
        // Low memory ends below 4 GiB.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.size as u32;
    }
    let map = memory_map(memory);
    for (slot, entry) in params.e820_table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: entry.address,
            size: entry.size,
            type_: if entry.usable { E820_RAM } else { E820_RESERVED },
        };
    }
    params.e820_entries = map.len() as u8;
    LinuxBootConfigurator::write_bootparams(
        &BootParams::new(&params, GuestAddress(layout::ZERO_PAGE)),
        memory,
    )
    .map_err(|_| BootError::MemoryTooSmall("the zero page"))
}
