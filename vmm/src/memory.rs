//! Guest memory.
//!
//! All of it lies in one memfd, because processes that serve devices map it too: offset 0 of the
//! file is guest-physical address 0, and what lies above the [hole](HOLE_START) follows without a
//! gap. The file is sealed at its size, so that no process that shares it can cut it short under
//! another. Nothing is touched before the guest or a device does: a page exists once it is written,
//! until it is [given back](give_back).

use std::fs::File;
use std::ops::Range;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use vm_memory::{Address, FileOffset, GuestAddress, GuestMemory as _, GuestMemoryRegion};

use crate::GuestMemory;

/// Where the hole for memory-mapped devices, interrupt controllers and KVM's own pages begins.
pub const HOLE_START: u64 = 0xc000_0000;

/// The first address after the hole.
pub const HOLE_END: u64 = 0x1_0000_0000;

/// What memory is given back in.
const PAGE: u64 = 4096;

/// The largest guest, in MiB: 1 TiB.
pub const MAX_MIB: u64 = 1 << 20;

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that is none.
    #[error("guest memory of {0} MiB: it must be between 1 and {MAX_MIB} MiB")]
    Size(u64),
    /// The file behind it.
    #[error("cannot {what} for {mib} MiB of guest memory")]
    File {
        /// What was being done.
        what: &'static str,
        /// The size asked for.
        mib: u64,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The mapping.
    #[error("cannot map {mib} MiB of guest memory: {reason}")]
    Map {
        /// The size asked for.
        mib: u64,
        /// Why it failed.
        reason: String,
    },
}

/// Makes guest memory of `mib` MiB, all zero.
///
/// # Errors
/// A size out of range, or a host that can't give that much address space.
pub fn allocate(mib: u64) -> Result<GuestMemory, MemoryError> {
    if !(1..=MAX_MIB).contains(&mib) {
        return Err(MemoryError::Size(mib));
    }
    let size = mib << 20;
    let file = sealed_memfd(size).map_err(|(what, source)| MemoryError::File {
        what,
        mib,
        source: source.into(),
    })?;
    map(file, size).map_err(|reason| MemoryError::Map { mib, reason })
}

fn sealed_memfd(size: u64) -> Result<File, (&'static str, rustix::io::Errno)> {
    let fd = rustix::fs::memfd_create(
        "kiln-guest-memory",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(|e| ("create a memfd", e))?;
    rustix::fs::ftruncate(&fd, size).map_err(|e| ("size a memfd", e))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
        .map_err(|e| ("seal a memfd", e))?;
    Ok(File::from(fd))
}

fn map(file: File, size: u64) -> Result<GuestMemory, String> {
    let file = std::sync::Arc::new(file);
    let low = size.min(HOLE_START);
    let mut ranges =
        vec![(GuestAddress(0), low as usize, Some(FileOffset::from_arc(file.clone(), 0)))];
    if size > low {
        let high = (size - low) as usize;
        ranges.push((GuestAddress(HOLE_END), high, Some(FileOffset::from_arc(file, low))));
    }
    GuestMemory::from_ranges_with_files(ranges).map_err(|e| e.to_string())
}

/// The guest-physical addresses below the hole that are memory.
pub fn low_range(memory: &GuestMemory) -> Range<u64> {
    let end = memory.iter().next().map_or(0, |region| region.len());
    0..end
}

/// The guest-physical addresses above the hole that are memory; empty if none are.
pub fn high_range(memory: &GuestMemory) -> Range<u64> {
    match memory.iter().nth(1) {
        Some(region) => HOLE_END..region.start_addr().raw_value() + region.len(),
        None => HOLE_END..HOLE_END,
    }
}

/// Why memory was not given back.
#[derive(Debug, thiserror::Error)]
pub enum GiveBackError {
    /// It is no guest memory.
    #[error("not guest memory")]
    Outside,
    /// The host.
    #[error("punch a hole into guest memory")]
    Host(#[source] std::io::Error),
}

/// Gives the pages that lie in a range of guest memory back to the host: they are zero until they are
/// written again. Pages that lie in it in part stay as they are.
///
/// # Errors
/// Not all of the range is guest memory, or the host can't; nothing has happened then.
pub fn give_back(
    memory: &GuestMemory,
    address: GuestAddress,
    length: u64,
) -> Result<(), GiveBackError> {
    let region = memory.find_region(address).ok_or(GiveBackError::Outside)?;
    let begin = address.0 - region.start_addr().0;
    let end = begin.checked_add(length).filter(|end| *end <= region.len());
    let end = end.ok_or(GiveBackError::Outside)?;
    let (begin, end) = (begin.next_multiple_of(PAGE), end / PAGE * PAGE);
    let (Some(length @ 1..), Some(file)) = (end.checked_sub(begin), region.file_offset()) else {
        return Ok(());
    };
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    let punched = rustix::fs::fallocate(file.file(), flags, file.start() + begin, length);
    punched.map_err(|error| GiveBackError::Host(error.into()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use vm_memory::Bytes;

    use super::*;

    #[test]
    fn memory_splits_around_the_hole() {
        let memory = allocate(3 * 1024 + 2).unwrap();
        assert_eq!(low_range(&memory), 0..HOLE_START);
        assert_eq!(high_range(&memory), HOLE_END..HOLE_END + (2 << 20));
        memory.write_obj(7u32, GuestAddress(HOLE_END)).unwrap();
        let region = memory.iter().nth(1).unwrap();
        let file = region.file_offset().unwrap();
        let mut bytes = [0; 4];
        rustix::io::pread(file.file(), &mut bytes, file.start()).unwrap();
        assert_eq!(u32::from_le_bytes(bytes), 7);
        assert_eq!(file.start(), HOLE_START);
    }

    #[test]
    fn memory_below_the_hole_is_one_range() {
        let memory = allocate(1).unwrap();
        assert_eq!((low_range(&memory), high_range(&memory)), (0..1 << 20, HOLE_END..HOLE_END));
    }

    #[test]
    fn the_file_cannot_be_resized() {
        let memory = allocate(1).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().clone();
        assert!(rustix::fs::ftruncate(file.file().as_fd(), 4096).is_err());
        assert!(rustix::fs::ftruncate(file.file().as_fd(), 8 << 20).is_err());
    }

    #[test]
    fn a_page_exists_once_written() {
        let memory = allocate(64).unwrap();
        let file = memory.iter().next().unwrap().file_offset().unwrap().clone();
        assert_eq!(rustix::fs::fstat(file.file()).unwrap().st_blocks, 0);
        memory.write_obj(1u8, GuestAddress(0x5000)).unwrap();
        assert!(rustix::fs::fstat(file.file()).unwrap().st_blocks > 0);
    }

    #[test]
    fn sizes_out_of_range_are_refused() {
        assert!(matches!(allocate(0), Err(MemoryError::Size(0))));
        assert!(matches!(allocate(u64::MAX), Err(MemoryError::Size(_))));
    }
}
