//! Containers: from a configuration to a process that ends.
//!
//! # Who does what
//! The agent reads the whole configuration into a [`Plan`] first; whatever it can't honour it refuses
//! by name, before anything exists. Then it [launches](launch) the container's first process, which
//! sets up itself: namespaces and tree ([`init`]), then identity ([`program`]). What takes more
//! privilege than that process has, in a user namespace, the agent does for it from outside: id
//! mappings, cgroup, OOM score, limits. The two talk over a [`channel`] that closes when the program
//! is executed. A further process [joins](join) the first one and is set up by the same code.
//!
//! # Namespaces
//! The guest holds one sandbox, so a namespace that the configuration shares with the host is shared
//! with the guest instead: that is private to the sandbox. Always new are the PID, mount and cgroup
//! namespaces, where the agent would otherwise be visible. A `path` names a namespace of the host,
//! which the guest cannot enter: what is done with it is the host side's concern, and the container
//! gets a namespace of its own. For user, mount and time namespaces it is refused.

pub mod channel;
mod hooks;
mod init;
mod join;
pub mod launch;
mod namespaces;
mod plan;
mod program;

pub use namespaces::{Namespaces, UserMappings};
pub use plan::Plan;
