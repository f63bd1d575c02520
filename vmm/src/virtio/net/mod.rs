//! virtio-net (virtio 1.2, section 5.1): a tap interface of the host as the guest's network card.
//!
//! Frames pass straight between guest memory and the tap, each with one system call and without a
//! copy in this process, unless one is larger than was expected. What the host's kernel can do for
//! the guest or have done by it goes with them in the header: checksums, and segmentation of TCP
//! (`TSO`) and, where the tap knows it, of UDP (`USO`). A tap takes no `UFO` any more.
//!
//! # What it promises
//! * One pair of queues. Received frames may lie in several buffers (`MRG_RXBUF`).
//! * The tap's offloads are those that the driver accepted, from its activation to its reset.
//! * Back-pressure both ways: the tap is not read while the guest has no buffers, which is where the
//!   host then drops; and the guest's frames wait in its queue while the tap takes none.
//! * [Limits](crate::config::RateConfig) of bytes and packets a second for each direction. What is
//!   over the limit waits, for up to which nothing is lost but time: in the guest's queue, or in that of the
//!   tap. Of what was not used, a twentieth of a second's worth can be caught up, or a number of bytes
//!   that is given.
//! * Memory is bounded: one frame of [`MAX_FRAME`] bytes.
//!
//! # What it refuses
//! * By dropping and [counting](Counts) the frame: one that is too short, longer than [`MAX_FRAME`] or in
//!   more pieces than a system call takes; a header that asks for what was not negotiated, that
//!   points outside of its frame, or whose segments are smaller than any that TCP makes; what the
//!   host's kernel refuses; what the guest has no room for in its whole queue. None of these ends
//!   anything.
//! * By stopping ([`DeviceError`](super::DeviceError)): chains outside of guest memory, and receive
//!   buffers that can't hold a header or lie in more pieces than a system call takes.
//!
//! A tap whose interface has been removed is a cable that was pulled: nothing arrives, and what is
//! sent is dropped.

mod device;
mod features;
mod header;
mod receive;
mod taken;
mod tap;
mod transmit;
mod wake;

pub use device::{Counts, Net, Settings};
pub use tap::NewError;

/// The longest frame: what the kernel puts together for segmentation offload, with the headers of
/// Ethernet and of a VLAN.
pub const MAX_FRAME: usize = 65_535 + 18;

#[cfg(test)]
mod tests;
