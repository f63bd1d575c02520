//! Loads a kernel's ELF image, after its headers were found to be ones that can be loaded.

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::elf::{Elf64_Ehdr, Elf64_Phdr, PT_LOAD};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Error as LoaderError, KernelLoader};
use vm_memory::ByteValued;

use crate::GuestMemory;
use crate::kvm::layout;
use crate::memory;

/// A kernel in guest memory.
#[derive(Debug)]
pub(super) struct Image {
    /// The ELF entry point, a physical address.
    pub entry: u64,
    /// The PVH entry point.
    pub pvh_entry: Option<u32>,
    /// The first address after the image, its zeroed parts included.
    pub end: u64,
}

/// Why an image can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It can't be read.
    #[error("cannot be read")]
    Read(#[source] std::io::Error),
    /// A bzImage.
    #[error("it is a bzImage; give the uncompressed vmlinux of the same build instead")]
    BzImage,
    /// Something else.
    #[error("it is not an ELF file; give an uncompressed vmlinux")]
    NotElf,
    /// An ELF for another processor.
    #[error(
        "it is not an ELF for 64-bit x86 (class {class}, machine {machine}); give an x86-64 vmlinux"
    )]
    OtherMachine {
        /// `EI_CLASS`.
        class: u8,
        /// `e_machine`.
        machine: u16,
    },
    /// Its program headers can't be right.
    #[error("its ELF headers are damaged: {0}; build or copy it again")]
    Damaged(&'static str),
    /// A segment lies where a guest has no memory to load it.
    #[error(
        "its segment at {start:#x} to {end:#x} lies outside of guest memory from {low:#x} to \
         {memory_end:#x}",
        low = layout::KERNEL_START
    )]
    Outside {
        /// First physical address.
        start: u64,
        /// First address after it.
        end: u64,
        /// End of memory below the hole.
        memory_end: u64,
    },
    /// The entry point is in no segment.
    #[error("its entry point {0:#x} is in none of its loaded segments")]
    Entry(u64),
    /// The loader refused it.
    #[error("cannot be loaded: {0}")]
    Load(LoaderError),
}

/// Checks and loads an image.
pub(super) fn load(memory: &GuestMemory, file: &mut File) -> Result<Image, ImageError> {
    let header = read_header(file)?;
    let segments = check_segments(file, &header, memory::low_range(memory).end)?;
    let loaded = Elf::load(memory, None, file, None).map_err(ImageError::Load)?;
    let within = |address: u64| segments.iter().any(|s| s.contains(&address));
    if !within(header.e_entry) {
        return Err(ImageError::Entry(header.e_entry));
    }
    let pvh_entry = match loaded.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => {
            let eip = u32::try_from(address.0).ok().filter(|eip| within(u64::from(*eip)));
            Some(eip.ok_or(ImageError::Entry(address.0))?)
        }
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => None,
    };
    let end = segments.iter().map(|s| s.end).max().unwrap_or(layout::KERNEL_START);
    Ok(Image { entry: header.e_entry, pvh_entry, end })
}

fn read_header(file: &File) -> Result<Elf64_Ehdr, ImageError> {
    const SETUP_HEADER_MAGIC: (u64, &[u8; 4]) = (0x202, b"HdrS");
    const MAGIC: &[u8; 4] = b"\x7fELF";
    const CLASS_64: u8 = 2;
    const EM_X86_64: u16 = 62;

    let mut header = Elf64_Ehdr::default();
    let read = read_up_to(file, header.as_mut_slice(), 0)?;
    if read < 4 || header.e_ident[..4] != MAGIC[..] {
        let mut magic = [0; 4];
        read_up_to(file, &mut magic, SETUP_HEADER_MAGIC.0)?;
        let bz_image = &magic == SETUP_HEADER_MAGIC.1;
        return Err(if bz_image { ImageError::BzImage } else { ImageError::NotElf });
    }
    let (class, machine) = (header.e_ident[4], header.e_machine);
    if class != CLASS_64 || machine != EM_X86_64 {
        return Err(ImageError::OtherMachine { class, machine });
    }
    if read < size_of::<Elf64_Ehdr>() {
        return Err(ImageError::Damaged("the file ends within them"));
    }
    if usize::from(header.e_phentsize) != size_of::<Elf64_Phdr>() {
        return Err(ImageError::Damaged("program headers of an unknown size"));
    }
    Ok(header)
}

/// The physical address ranges that the image takes.
fn check_segments(
    file: &File,
    header: &Elf64_Ehdr,
    memory_end: u64,
) -> Result<Vec<std::ops::Range<u64>>, ImageError> {
    let mut segments = Vec::new();
    for index in 0..u64::from(header.e_phnum) {
        let mut segment = Elf64_Phdr::default();
        let at = header
            .e_phoff
            .checked_add(index * size_of::<Elf64_Phdr>() as u64)
            .ok_or(ImageError::Damaged("program headers past the end of the file"))?;
        if read_up_to(file, segment.as_mut_slice(), at)? < size_of::<Elf64_Phdr>() {
            return Err(ImageError::Damaged("program headers past the end of the file"));
        }
        if segment.p_type != PT_LOAD || segment.p_memsz == 0 {
            continue;
        }
        if segment.p_filesz > segment.p_memsz {
            return Err(ImageError::Damaged("a segment larger in the file than in memory"));
        }
        let start = segment.p_paddr;
        let end = start.saturating_add(segment.p_memsz);
        if start < layout::KERNEL_START || end > memory_end {
            return Err(ImageError::Outside { start, end, memory_end });
        }
        segments.push(start..end);
    }
    Ok(segments)
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize, ImageError> {
    let mut done = 0;
    while done < buffer.len() {
        match file.read_at(&mut buffer[done..], offset.saturating_add(done as u64)) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == std::io::ErrorKind::InvalidInput => break,
            Err(e) => return Err(ImageError::Read(e)),
        }
    }
    Ok(done)
}
