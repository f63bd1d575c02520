//! Loads a kernel and prepares what it finds in memory when it is entered.
//!
//! Two ways in, both for an uncompressed x86-64 ELF: the [64-bit entry](linux) of Linux's boot
//! protocol, and [PVH](pvh), which the ELF announces with a note. The kernel file is the operator's
//! and not the guest's, but it may be anything: its headers are checked before a byte is loaded.

mod image;
mod linux;
mod mp_table;
mod page_tables;
mod pvh;

use std::fs::File;
use std::io::{Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress};

use super::layout;
use crate::GuestMemory;
use crate::config::Entry;
use crate::memory;

/// What a machine boots.
#[derive(Debug)]
pub struct Kernel {
    /// An uncompressed x86-64 ELF.
    pub image: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line, complete.
    pub cmdline: String,
    /// How the kernel is entered.
    pub entry: Entry,
}

/// Where and in which mode the first processor begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryPoint {
    /// Long mode, paging on, `rsi` holds the zero page's address.
    Linux64 {
        /// Where.
        rip: u64,
    },
    /// Protected mode, paging off, `ebx` holds the start info's address.
    Pvh {
        /// Where.
        eip: u32,
    },
}

/// An initial RAM disk in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    address: u64,
    size: u64,
}

/// Why a kernel can't be booted.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// Not a kernel that can be booted here.
    #[error("kernel: {0}")]
    Image(#[from] image::ImageError),
    /// The entry asked for isn't there.
    #[error("kernel: it has no PVH entry note (XEN_ELFNOTE_PHYS32_ENTRY)")]
    NoPvhEntry,
    /// The initial RAM disk can't be read.
    #[error("initrd: cannot be read")]
    InitrdRead(#[source] std::io::Error),
    /// The initial RAM disk does not fit.
    #[error(
        "initrd: its {size} bytes do not fit between the kernel's end at {kernel_end:#x} and the \
         end of memory at {memory_end:#x}; give the guest more memory"
    )]
    InitrdTooLarge {
        /// Its size in bytes.
        size: u64,
        /// First address after the kernel.
        kernel_end: u64,
        /// End of memory below the hole.
        memory_end: u64,
    },
    /// The command line is too long.
    #[error(
        "command line: its {0} bytes, devices included, are more than the kernel's limit of {max}; \
         shorten it (kernel_args of the configuration file, --cmdline)",
        max = layout::CMDLINE_MAX - 1
    )]
    CmdlineTooLong(usize),
    /// The command line holds what no command line can.
    #[error("command line: it holds a NUL byte")]
    CmdlineNul,
    /// Memory ends before what every guest needs.
    #[error("guest memory is too small for {0}; give the guest more memory")]
    MemoryTooSmall(&'static str),
}

/// The command line with the machine's virtio-mmio windows in it, in the form of Linux's
/// `virtio_mmio.device` parameter (drivers/virtio/virtio_mmio.c). What follows ` -- ` is for init
/// and stays at the end.
pub fn announce_devices(cmdline: &str, devices: usize) -> String {
    let (kernel, init) = match cmdline.split_once(" -- ") {
        Some((kernel, init)) => (kernel, Some(init)),
        None => (cmdline, None),
    };
    let mut words: Vec<String> =
        Some(kernel.trim()).filter(|k| !k.is_empty()).map(str::to_owned).into_iter().collect();
    words.extend((0..devices).map(|index| {
        let (size, irq) = (layout::MMIO_WINDOW_SIZE >> 10, layout::device_irq(index));
        format!("virtio_mmio.device={size}K@{:#x}:{irq}", layout::window(index))
    }));
    words.extend(init.map(|init| format!("-- {init}")));
    words.join(" ")
}

/// Puts the kernel and what it needs into memory.
///
/// # Errors
/// See [`BootError`].
pub fn load(memory: &GuestMemory, kernel: Kernel, cpus: u8) -> Result<EntryPoint, BootError> {
    let Kernel { mut image, initrd, cmdline, entry } = kernel;
    write_cmdline(memory, &cmdline)?;
    let loaded = image::load(memory, &mut image)?;
    let initrd = initrd.map(|file| load_initrd(memory, file, loaded.end)).transpose()?;
    mp_table::write(memory, cpus)?;
    match (entry, loaded.pvh_entry) {
        (Entry::Pvh, None) => Err(BootError::NoPvhEntry),
        (Entry::Pvh | Entry::Auto, Some(eip)) => {
            pvh::write(memory, initrd)?;
            Ok(EntryPoint::Pvh { eip })
        }
        (Entry::Linux64, _) | (Entry::Auto, None) => {
            linux::write(memory, initrd, cmdline.len())?;
            page_tables::write(memory)?;
            Ok(EntryPoint::Linux64 { rip: loaded.entry })
        }
    }
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() >= layout::CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong(cmdline.len()));
    }
    if cmdline.contains('\0') {
        return Err(BootError::CmdlineNul);
    }
    memory
        .write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE))
        .map_err(|_| BootError::MemoryTooSmall("the command line"))
}

/// Reads the initial RAM disk to the highest page of low memory that has room for it.
fn load_initrd(memory: &GuestMemory, mut file: File, kernel_end: u64) -> Result<Initrd, BootError> {
    let size = file.seek(SeekFrom::End(0)).map_err(BootError::InitrdRead)?;
    file.rewind().map_err(BootError::InitrdRead)?;
    let memory_end = memory::low_range(memory).end;
    let address = memory_end
        .checked_sub(size)
        .map(|address| address & !0xfff)
        .filter(|address| *address >= kernel_end)
        .ok_or(BootError::InitrdTooLarge { size, kernel_end, memory_end })?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size as usize)
        .map_err(|e| BootError::InitrdRead(std::io::Error::other(e)))?;
    Ok(Initrd { address, size })
}

/// A range of guest-physical memory, as boot protocols describe it.
struct MapEntry {
    address: u64,
    size: u64,
    usable: bool,
}

/// Memory as the guest may use it: the MP table's area is not usable.
fn memory_map(memory: &GuestMemory) -> Vec<MapEntry> {
    let (low, high) = (memory::low_range(memory), memory::high_range(memory));
    let entry = |start: u64, end: u64, usable| MapEntry {
        address: start,
        size: end.saturating_sub(start),
        usable,
    };
    let mut map = vec![
        entry(0, layout::MP_TABLE, true),
        entry(layout::MP_TABLE, layout::BASE_MEMORY_END, false),
        entry(layout::KERNEL_START, low.end, true),
        entry(high.start, high.end, true),
    ];
    map.retain(|entry| entry.size > 0);
    map
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    #[test]
    fn the_command_line_has_a_limit() {
        let memory = memory::allocate(4).unwrap();
        write_cmdline(&memory, &"x".repeat(2047)).unwrap();
        let error = write_cmdline(&memory, &"x".repeat(2048)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "command line: its 2048 bytes, devices included, are more than the kernel's limit of \
             2047; shorten it (kernel_args of the configuration file, --cmdline)"
        );
        assert!(matches!(write_cmdline(&memory, "a\0b"), Err(BootError::CmdlineNul)));
    }

    #[test]
    fn devices_are_announced_before_what_is_for_init() {
        assert_eq!(announce_devices("", 0), "");
        assert_eq!(announce_devices("quiet", 1), "quiet virtio_mmio.device=4K@0xd0000000:5");
        assert_eq!(
            announce_devices("a -- b -- c", 2),
            "a virtio_mmio.device=4K@0xd0000000:5 virtio_mmio.device=4K@0xd0001000:6 -- b -- c"
        );
    }

    #[test]
    fn the_initrd_lies_at_the_top_of_low_memory() {
        let memory = memory::allocate(4).unwrap();
        let initrd = load_initrd(&memory, file_of(&[7; 5000]), 0x10_0000).unwrap();
        assert_eq!(initrd, Initrd { address: 0x3f_e000, size: 5000 });
        let last: u8 = memory.read_obj(GuestAddress(initrd.address + 4999)).unwrap();
        assert_eq!(last, 7);
    }

    #[test]
    fn an_initrd_over_the_kernel_is_refused() {
        let memory = memory::allocate(4).unwrap();
        let error = load_initrd(&memory, file_of(&[7; 5000]), 0x3f_f000).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { size: 5000, .. }), "{error}");
    }

    #[test]
    fn the_memory_map_leaves_out_the_hole_and_the_mp_table() {
        let memory = memory::allocate(4096).unwrap();
        let map: Vec<_> =
            memory_map(&memory).iter().map(|e| (e.address, e.size, e.usable)).collect();
        assert_eq!(
            map,
            [
                (0, 0x9fc00, true),
                (0x9fc00, 0x400, false),
                (0x10_0000, 0xc000_0000 - 0x10_0000, true),
                (0x1_0000_0000, 0x4000_0000, true),
            ]
        );
    }
}
