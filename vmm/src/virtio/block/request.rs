//! One request: taking it apart, checking it, carrying it out (virtio 1.2, section 5.2.6).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP,
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::config::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_ZERO_SECTORS, SECTOR};
use super::disk::Disk;
use crate::virtio::buffers::{Buffers, Bytes};

/// Size of `struct virtio_blk_req` up to its data.
const HEADER: usize = 16;

/// Size of `struct virtio_blk_discard_write_zeroes`.
const RANGE: usize = 16;

/// The disk's id as the guest reads it, padded with zeroes.
pub(super) type Id = [u8; VIRTIO_BLK_ID_BYTES as usize];

/// What a request does on a disk.
pub(super) struct Target<'d> {
    pub(super) disk: &'d Disk,
    pub(super) id: &'d Id,
    pub(super) read_only: bool,
}

/// Why a request failed, as the status that says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Error,
    Unsupported,
}

impl From<std::io::Error> for Refusal {
    fn from(error: std::io::Error) -> Self {
        tracing::debug!(%error, "disk request failed");
        Self::Error
    }
}

/// A range of a discard or write-zeroes request.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

/// What a request came to.
pub(super) struct Served {
    /// How many bytes were written from the chain's first writable byte on.
    pub(super) written: u32,
    /// What counts against the disk's limit.
    pub(super) bytes: usize,
}

/// What was done for a request.
#[derive(Default)]
struct Done {
    /// Bytes of data that were written to the guest.
    written: usize,
    /// Bytes of the disk that were cleared.
    cleared: usize,
}

impl Done {
    fn written(written: usize) -> Self {
        Self { written, cleared: 0 }
    }
}

impl Target<'_> {
    /// Carries a request out and writes its status. Returns `None` if there is no byte for that.
    pub(super) fn serve(&self, buffers: Buffers<'_>) -> Option<Served> {
        let Buffers { readable, mut writable } = buffers;
        let carried = readable.len().saturating_add(writable.len());
        let mut status = writable.take_last()?;
        let room = writable.len();
        let (code, done) = match self.carry_out(readable, writable) {
            Ok(done) => (VIRTIO_BLK_S_OK, done),
            Err(Refusal::Error) => (VIRTIO_BLK_S_IOERR, Done::default()),
            Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, Done::default()),
        };
        status.write(&[code as u8]);
        // The status only counts when nothing lies unwritten before it.
        let written = if done.written == room { room + 1 } else { done.written };
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        Some(Served { written, bytes: carried.saturating_add(done.cleared) })
    }

    fn carry_out(&self, mut readable: Bytes<'_>, mut writable: Bytes<'_>) -> Result<Done, Refusal> {
        let mut header = [0; HEADER];
        if readable.read(&mut header) != HEADER {
            return Err(Refusal::Error);
        }
        let kind = u32_at(&header, 0);
        let sector = u64_at(&header, 8);
        match kind {
            VIRTIO_BLK_T_IN => {
                let count = writable.len();
                let offset = self.check(sector, count)?;
                self.disk.read(offset, writable)?;
                Ok(Done::written(count))
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                let offset = self.check(sector, readable.len())?;
                self.disk.write(offset, readable)?;
                Ok(Done::default())
            }
            VIRTIO_BLK_T_FLUSH => {
                self.disk.flush()?;
                Ok(Done::default())
            }
            VIRTIO_BLK_T_GET_ID if writable.len() >= self.id.len() => {
                Ok(Done::written(writable.write(self.id)))
            }
            VIRTIO_BLK_T_GET_ID => Err(Refusal::Error),
            VIRTIO_BLK_T_DISCARD => {
                self.check_writable()?;
                let ranges = self.ranges(readable, MAX_DISCARD_SECTORS, 0)?;
                for (offset, length, _) in ranges {
                    self.disk.discard(offset, length)?;
                }
                Ok(Done::default())
            }
            VIRTIO_BLK_T_WRITE_ZEROES => {
                self.check_writable()?;
                let unmap = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                let ranges = self.ranges(readable, MAX_ZERO_SECTORS, unmap)?;
                let mut cleared = 0usize;
                for (offset, length, flags) in ranges {
                    self.disk.write_zeroes(offset, length, flags & unmap != 0)?;
                    // Zeroes may have been written for all of it.
                    cleared = cleared.saturating_add(length as usize);
                }
                Ok(Done { written: 0, cleared })
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    fn check_writable(&self) -> Result<(), Refusal> {
        if self.read_only { Err(Refusal::Error) } else { Ok(()) }
    }

    /// The offset in the file of `length` bytes from `sector` on, if all of them exist.
    fn check(&self, sector: u64, length: usize) -> Result<u64, Refusal> {
        let length = length as u64;
        if !length.is_multiple_of(SECTOR) {
            return Err(Refusal::Error);
        }
        let end = sector.checked_add(length / SECTOR).ok_or(Refusal::Error)?;
        if end > self.disk.sectors() {
            return Err(Refusal::Error);
        }
        Ok(sector * SECTOR)
    }

    /// The ranges of a discard or write-zeroes request, as offset, length and flags, all checked
    /// before the first is carried out.
    fn ranges(
        &self,
        mut data: Bytes<'_>,
        max_sectors: u32,
        allowed_flags: u32,
    ) -> Result<Vec<(u64, u64, u32)>, Refusal> {
        let count = data.len() / RANGE;
        if data.is_empty() || !data.len().is_multiple_of(RANGE) || count > MAX_RANGES as usize {
            return Err(Refusal::Error);
        }
        let mut ranges = Vec::with_capacity(count);
        for _ in 0..count {
            let mut bytes = [0; RANGE];
            data.read(&mut bytes);
            let range = Range {
                sector: u64_at(&bytes, 0),
                sectors: u32_at(&bytes, 8),
                flags: u32_at(&bytes, 12),
            };
            if range.flags & !allowed_flags != 0 {
                return Err(Refusal::Unsupported);
            }
            let end = range.sector.checked_add(range.sectors.into()).ok_or(Refusal::Error)?;
            if range.sectors > max_sectors || end > self.disk.sectors() {
                return Err(Refusal::Error);
            }
            if range.sectors != 0 {
                let length = u64::from(range.sectors) * SECTOR;
                ranges.push((range.sector * SECTOR, length, range.flags));
            }
        }
        Ok(ranges)
    }
}

fn u32_at(bytes: &[u8; 16], offset: usize) -> u32 {
    let mut value = [0; 4];
    value.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(value)
}

fn u64_at(bytes: &[u8; 16], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(value)
}
