//! What a process of a container is: identity, privileges, limits, program.

pub mod capabilities;
pub mod executable;
pub mod listing;
mod plan;
pub mod rlimits;
pub mod scheduling;
pub mod sysctl;
pub mod user;

pub use plan::ProcessPlan;
