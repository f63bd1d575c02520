//! The messages between kiln's monitor on the host and its agent in the guest.
//!
//! # Connections
//! All of it runs over vsock.
//!
//! * The **control connection**: the agent connects to [`CONTROL_PORT`] of the host (CID 2) once it
//!   is ready. The host accepts exactly one connection on that port in a sandbox's life, so that
//!   nothing started later in the guest can pose as the agent. It carries [frames](frame), each one
//!   message: [`ToAgent`] downwards, [`FromAgent`] upwards.
//! * **Streams**: for each stdio stream of a process the host connects to [`STREAM_PORT`] of the
//!   guest and sends one [`StreamHeader`]; from then on the connection is the stream, raw, in both
//!   directions. Half-closing it is end of file. Back-pressure is vsock's own credit.
//!
//! # Trust
//! The guest is hostile. Every frame has a length cap ([`MAX_TO_AGENT`], [`MAX_FROM_AGENT`]) that
//! is checked before anything is allocated, a message that does not parse ends the connection, and
//! no field of a [`FromAgent`] message may be used as a host path, size or index unchecked.
//!
//! # Versions
//! [`VERSION`] is exact: kiln ships monitor and agent together, so an agent of another version is an
//! installation error and is reported as one.

mod ask;
mod bounded;
mod exec;
pub mod frame;
mod message;
pub mod network;
pub mod statistics;
mod stream;
#[cfg(test)]
mod tests;

pub use ask::{Answer, GuestProcess, MAX_COMMAND, MAX_MESSAGE, MAX_NAME, MAX_PROCESSES, Question};
pub use exec::{ExecId, ExecProcess};
pub use message::{
    BindMount, CreateContainer, ExitStatus, FailurePhase, FromAgent, Joined, Stdio, ToAgent,
    WindowSize,
};
pub use network::Network;
pub use statistics::Statistics;
pub use stream::{StreamHeader, StreamToken};

/// Version of everything in this crate. Any change of a message's shape or meaning raises it.
pub const VERSION: u32 = 7;

/// vsock port on the host (CID 2) that the agent connects to once.
pub const CONTROL_PORT: u32 = 1024;

/// vsock port in the guest on which the agent accepts stdio streams.
pub const STREAM_PORT: u32 = 1025;

/// The tag of the virtio-fs device that holds everything shared with the guest. Where something is in
/// it, the message says that is about it.
pub const SHARE_TAG: &str = "kiln";

/// Longest frame the agent accepts, in bytes: room for a container's whole configuration.
pub const MAX_TO_AGENT: usize = 8 << 20;

/// Longest frame the monitor accepts, in bytes: room for a list of [`MAX_PROCESSES`].
pub const MAX_FROM_AGENT: usize = 4 << 20;
