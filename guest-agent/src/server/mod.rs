//! The agent's event loop: one thread, one epoll descriptor, no waiting anywhere else.
//!
//! What happens is: the host sends a message, the host connects a stream, a stream can go on, a
//! container's first process reports, a child ends. Each is dealt with without blocking. What the
//! guest's processes do cannot stop the loop; when the control connection ends, for whatever reason,
//! so does the guest.

mod agent;
mod control;
mod poll;
mod relays;
mod running;
mod streams;
mod supplies;

pub use agent::{Agent, Ending};
pub use control::Control;
pub use supplies::Environment;
