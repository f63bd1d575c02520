//! The configuration space (virtio 1.2, section 5.2.4).

use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};

/// Bytes in a sector, the unit of every address and count.
pub(super) const SECTOR: u64 = 512;

/// Largest size of the request queue.
pub(super) const QUEUE_SIZE: u16 = 128;

/// Most data descriptors of a request: the queue's, without header and status.
const MAX_SEGMENTS: u32 = QUEUE_SIZE as u32 - 2;

/// Most ranges of a discard or write-zeroes request.
pub(super) const MAX_RANGES: u32 = 64;

/// Most sectors of one range of a discard: 2 GiB.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;

/// Most sectors of one range of a write-zeroes: 16 MiB, since zeroes may have to be written.
pub(super) const MAX_ZERO_SECTORS: u32 = 1 << 15;

/// The device's own feature bits.
pub(super) fn features(read_only: bool) -> u64 {
    let common = 1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
    if read_only {
        return common | 1 << VIRTIO_BLK_F_RO;
    }
    common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
}

/// The bytes of `struct virtio_blk_config` for a disk of `sectors`.
pub(super) fn space(sectors: u64) -> [u8; 60] {
    let mut space = [0; 60];
    let mut put = |offset: usize, bytes: &[u8]| {
        space[offset..offset + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &sectors.to_le_bytes());
    put(12, &MAX_SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(36, &MAX_DISCARD_SECTORS.to_le_bytes());
    put(40, &MAX_RANGES.to_le_bytes());
    // discard_sector_alignment: a page of the host, in sectors.
    put(44, &8u32.to_le_bytes());
    put(48, &MAX_ZERO_SECTORS.to_le_bytes());
    put(52, &MAX_RANGES.to_le_bytes());
    // write_zeroes_may_unmap
    put(56, &[1]);
    space
}
