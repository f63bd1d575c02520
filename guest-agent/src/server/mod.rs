//! The agent's event loop: one thread, one epoll descriptor, no waiting anywhere else.
//!
//! What happens is: the host sends a message, the host connects a stream, a stream can go on, a
//! process on its way to its program reports, a child ends. Each is dealt with without blocking. What the
//! guest's processes do cannot stop the loop; when the control connection ends, for whatever reason,
//! so does the guest.

mod agent;
mod container;
mod control;
mod poll;
mod process;
mod relays;
mod streams;
mod supplies;

pub use agent::{Agent, Ending};
pub use control::Control;
pub use supplies::Environment;
