//! What a kernel finds that is entered by PVH (Xen's docs/misc/pvh.pandoc and
//! include/public/arch-x86/hvm/start_info.h): start info, memory map and modules.

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::GuestAddress;

use super::{BootError, Initrd, memory_map};
use crate::GuestMemory;
use crate::kvm::layout;

const MAGIC: u32 = 0x336e_c578;
/// The first version with a memory map.
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Writes start info, memory map and, with an initial RAM disk, the list that holds it.
pub(super) fn write(memory: &GuestMemory, initrd: Option<Initrd>) -> Result<(), BootError> {
    let map: Vec<_> = memory_map(memory)
        .iter()
        .map(|entry| hvm_memmap_table_entry {
            addr: entry.address,
            size: entry.size,
            type_: if entry.usable { RAM } else { RESERVED },
            reserved: 0,
        })
        .collect();
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: layout::CMDLINE,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    let modules = initrd.map(|initrd| hvm_modlist_entry {
        paddr: initrd.address,
        size: initrd.size,
        ..Default::default()
    });
    if modules.is_some() {
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    let mut params = BootParams::new(&info, GuestAddress(layout::PVH_START_INFO));
    params.set_sections(&map, GuestAddress(layout::PVH_MEMORY_MAP));
    if let Some(module) = modules {
        params.set_modules(&[module], GuestAddress(layout::PVH_MODULES));
    }
    PvhBootConfigurator::write_bootparams(&params, memory)
        .map_err(|_| BootError::MemoryTooSmall("the PVH start info"))
}
