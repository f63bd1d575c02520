//! virtio-balloon (virtio 1.2, section 5.5), for what its name does not say: the guest reports which
//! of its memory is free, and the host takes those pages back until the guest uses them again.
//!
//! The host never asks for memory: the balloon's size is 0. What a driver puts into it all the same
//! is used up unread; pages that the guest does without are reported soon enough.
//!
//! # What a report may do
//! It names ranges of guest memory, whose content is zero from then on. Whoever reports what is in
//! use spoils their own memory. Ranges must lie in guest memory
//! ([`DeviceError`](super::DeviceError)); of a page that is reported in part nothing happens. A host
//! that can't give a page back keeps it, which is no error: the guest relies on nothing.

mod device;

#[cfg(test)]
mod tests;

pub use device::Balloon;
