//! The guest as a machine: what PID 1 does for it besides containers.

pub mod boot;
pub mod clock;
pub mod power;
pub mod share;
