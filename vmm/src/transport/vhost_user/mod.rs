//! Serves a virtio device to QEMU over vhost-user, as the back-end.
//!
//! [`serve`] takes one connection on a listening socket and runs the device on the calling thread:
//! the front-end's messages, the doorbells and the device's
//! [host events](crate::virtio::VirtioDevice::host_events) are all waited for in one place, so
//! nothing runs beside the device. It is written against the `vhost` crate's message layer and not
//! on `vhost-user-backend`, which spreads a device over two threads and does not tell it when its
//! queues are stopped.
//!
//! # What it promises
//! * A queue is served from when the front-end has both started it (kick descriptor) and enabled it,
//!   and is rung once by then. Enabling may come before all else, as QEMU does it for network devices. It is no longer touched once `GET_VRING_BASE` is answered.
//! * The device is [reset](crate::virtio::VirtioDevice::reset) when its last queue is stopped: QEMU
//!   stops all of them when the driver resets the device.
//! * Guest memory is what the front-end's memory table says at each moment; every ring address is
//!   translated by it and checked before the queue is served.
//! * A device that fails ([`DeviceError`](crate::virtio::DeviceError)) is served no more until it is
//!   reset; the front-end is told through the vrings' error descriptors.
//! * When the front-end goes away the device is reset. One that has host events goes on being told
//!   of them, so that what the guest left with it still gets out; [`serve`] returns when the socket
//!   `until` hangs up.
//!
//! # What it refuses
//! Polling rings (no kick descriptor), dirty-page logging, in-flight descriptors, migration: a
//! sandbox doesn't move. A message that is refused ends the serving, for the front-end would go on as
//! if it had been heard.
//!
//! # Trust
//! QEMU runs guest code and counts as its own: message bodies are bounded and checked by `vhost`,
//! addresses and sizes here. It can disturb its own devices and nothing else.

mod memory;
mod messages;
mod serve;
mod session;
mod vring;

pub use serve::{ServeError, serve};

#[cfg(test)]
mod tests;
