//! The front-end's memory table: guest memory, and where the front-end has it in its own.

use std::fs::File;
use std::io;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{GuestAddress, GuestRegionMmap};

use crate::GuestMemory;

/// Guest memory, mapped. Empty until the front-end has sent its table.
pub(super) struct MemoryTable {
    memory: GuestMemory,
    regions: Vec<Region>,
}

struct Region {
    front_end: u64,
    guest: u64,
    size: u64,
}

impl MemoryTable {
    pub(super) fn empty() -> Self {
        Self { memory: GuestMemory::new(), regions: Vec::new() }
    }

    /// Maps the regions of a table.
    pub(super) fn map(table: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self> {
        if table.len() != files.len() {
            return Err(Error::IncorrectFds);
        }
        let mut mapped = Vec::with_capacity(table.len());
        let mut regions = Vec::with_capacity(table.len());
        for (region, file) in table.iter().zip(files) {
            let (front_end, guest, size) =
                (region.user_addr, region.guest_phys_addr, region.memory_size);
            if front_end.checked_add(size).is_none() || guest.checked_add(size).is_none() {
                return Err(Error::InvalidParam);
            }
            let mapping = region.mmap_region(file)?;
            let mapping = GuestRegionMmap::new(mapping, GuestAddress(guest));
            mapped.push(mapping.ok_or(Error::InvalidParam)?);
            regions.push(Region { front_end, guest, size });
        }
        let memory = GuestMemory::from_regions(mapped)
            .map_err(|error| Error::ReqHandlerError(io::Error::other(error)))?;
        Ok(Self { memory, regions })
    }

    pub(super) fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The guest-physical address of one of the front-end's.
    pub(super) fn guest_address(&self, front_end: u64) -> Result<GuestAddress> {
        self.regions
            .iter()
            .find_map(|region| {
                let offset = front_end.checked_sub(region.front_end)?;
                (offset < region.size).then(|| GuestAddress(region.guest + offset))
            })
            .ok_or(Error::InvalidParam)
    }
}
