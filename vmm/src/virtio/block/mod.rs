//! virtio-blk (virtio 1.2, section 5.2): a raw file or a block device as a disk.
//!
//! # What it promises
//! * One request queue. Data passes straight between guest memory and the file.
//! * `FLUSH` (`fdatasync`), `DISCARD` (the space is given back), `WRITE_ZEROES` (with or without giving
//!   it back), the disk's id, read-only disks.
//! * The capacity is the file's size when the device is made, rounded down to whole sectors of 512
//!   bytes: what lies behind the last whole sector is neither read nor written.
//! * Without the `FLUSH` feature acknowledged, as with it, a completed write is in the host's page
//!   cache, not on its disk: the guest outlives no crash of the host anyway.
//!
//! # What it refuses
//! * With `VIRTIO_BLK_S_IOERR`: requests that reach past the capacity or whose data is not whole
//!   sectors, writes of any kind to a read-only disk, malformed discards, and what the host fails
//!   to do.
//! * With `VIRTIO_BLK_S_UNSUPP`: request types and flags that are not offered.
//! * By stopping ([`DeviceError`](super::DeviceError)): chains outside of guest memory and chains that
//!   have no byte to write a status to.
//!
//! Requests are served in order, one at a time, on the device's thread. What is over the disk's limits
//! waits in the queue, and holds nothing up but its own disk.

mod config;
mod device;
mod disk;
mod request;

pub use device::Block;
pub use disk::OpenError;

#[cfg(test)]
mod tests;
