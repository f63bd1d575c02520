//! What kiln remembers of a container between commands: a directory below `--root`.
//!
//! * [`directory`]: the directory, and the lock that says who stands for the sandbox.
//! * [`record`]: `state.json`, what is known of the container.
//! * [`lookup`]: containers as a command finds them, with what they are *now*: a record can't know
//!   that its monitor was killed.
//!
//! Nothing else is remembered.

mod directory;
mod lookup;
mod record;

pub use directory::{StateDir, StateError};
pub use lookup::{Container, all, find};
pub use record::{End, Monitor, Record, Status};
