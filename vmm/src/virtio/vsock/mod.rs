//! virtio-vsock (virtio 1.2, section 5.10): stream sockets between guest and host.
//!
//! On the host's side every connection is a Unix stream socket, made by the monitor or handed to it
//! over the [broker]. The device moves bytes between those sockets and the guest's memory, without
//! copies unless a host process reads slower than its guest writes.
//!
//! # What it promises
//! * No byte is lost or reordered, whoever is slow: the guest is held back by credit, the host by
//!   its sockets. A host socket is read only while the guest has receive buffers and credit.
//! * Half-closing works in both directions; end of file arrives after the last byte.
//! * What the guest has sent before it closes, resets or switches off still reaches the host.
//! * Memory is bounded: at most [`MAX_CONNECTIONS`] connections, of which each holds at most
//!   [`BUFFER_SIZE`] bytes that the host has not read yet.
//!
//! # What it refuses, with `VIRTIO_VSOCK_OP_RST`
//! * connections to host ports that the configuration does not name, and to a named one that has
//!   had its connection: each host port serves **one connection in the device's life**, across
//!   resets of the driver, so that nothing started later in the guest can pose as its first client;
//! * packets of unknown connections, of other context ids, of other socket types than stream
//!   (`SEQPACKET` is not offered), with lengths that do not fit their chain or operation, or with
//!   more data than the credit given.
//!
//! A guest that does not take its receive buffers' worth is served no further until it does: at most
//! [`MAX_REPLIES`] answers are held for it.

pub mod broker;
mod connection;
mod device;
mod mux;
mod packet;
mod table;

pub use device::{NewError, Vsock};

/// Most connections at a time, those included that the guest has ended and the host has not read
/// to their end.
pub const MAX_CONNECTIONS: usize = 256;

/// The credit of each connection: how many bytes the guest may send ahead of the host's reading.
pub const BUFFER_SIZE: u32 = 256 << 10;

/// How many answers wait for the guest's receive buffers before no more packets are taken from it.
pub const MAX_REPLIES: usize = 256;

#[cfg(test)]
mod tests;
