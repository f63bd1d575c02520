//! The page tables and descriptors with which a 64-bit kernel begins: the first 4 GiB one to one,
//! in pages of 2 MiB.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::GuestMemory;
use crate::kvm::layout;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;
const PAGE: u64 = 0x1000;

/// Writes the page tables to [`layout::PAGE_TABLES`].
pub(super) fn write(memory: &GuestMemory) -> Result<(), BootError> {
    let pointers = layout::PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    let mut table = vec![0u8; ((2 + DIRECTORIES) * PAGE) as usize];
    let mut set = |at: u64, entry: u64| {
        let at = (at - layout::PAGE_TABLES) as usize;
        table[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    set(layout::PAGE_TABLES, pointers | PRESENT_WRITABLE);
    for directory in 0..DIRECTORIES {
        set(pointers + directory * 8, (directories + directory * PAGE) | PRESENT_WRITABLE);
    }
    for page in 0..DIRECTORIES * ENTRIES {
        set(directories + page * 8, (page << 21) | LARGE_PAGE | PRESENT_WRITABLE);
    }
    memory
        .write_slice(&table, GuestAddress(layout::PAGE_TABLES))
        .map_err(|_| BootError::MemoryTooSmall("the page tables"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_below_4_gib_maps_to_itself() {
        let memory = crate::memory::allocate(1).unwrap();
        write(&memory).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            memory.read_obj(GuestAddress((table & !0xfff) + index * 8)).unwrap()
        };
        for address in [0u64, 0x10_0000, 0x4020_0000, 0xd000_0000, 0xffff_ffff] {
            let pointers = entry(layout::PAGE_TABLES, address >> 39);
            let directory = entry(pointers, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
            assert_eq!(page & 0x83, 0x83);
        }
    }
}
