//! Stdio streams: bytes between a container's pipes or terminal and connections from the host.
//!
//! A [`Relay`] carries one direction. It holds at most one buffer, and takes nothing from its source
//! that its sink hasn't room for, so a slow reader slows the writer down and nothing is ever dropped.
//! Output from a pipe isn't copied through the agent at all: splice(2) moves it to the socket.
//!
//! # Ends
//! * When the last writer of a pipe is gone, or the last user of a terminal (which reads as `EIO`),
//!   the connection is half-closed after all that was written, and closed once the host has closed it
//!   too: nothing that is on its way is cut off.
//! * When the host half-closes standard input, the pipe is closed. On a terminal nothing happens: a
//!   host at its end of file hasn't typed Ctrl-D.
//! * When the host has closed its side of an output, the container's next write fails, as with any
//!   reader that went away.

mod relay;
mod socket;

pub use relay::{Progress, Relay, Side, make_non_blocking};
pub use socket::{accept_from_host, connect_to_host, listen};
