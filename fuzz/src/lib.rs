//! Fuzz targets: one for each parser of bytes that kiln doesn't trust.
//!
//! A target is a function of bytes that must return, whatever they are; a panic is a finding. The
//! bytes are no recording of what a parser reads but a script ([`input`]): what a driver puts into
//! its queues, what the host does meanwhile. So most of what a fuzzer makes up gets past the first
//! check.
//!
//! `fuzz/run` has libFuzzer make inputs up; `corpus/<target>/` keeps those that reach something that
//! others don't, and what once found a fault. The tests replay them all, without libFuzzer.

// What fails here is the target's set-up, or a promise of what it tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../../src/bundle/mod.rs"]
pub mod bundle;
#[path = "../../src/sandbox/conversation/mod.rs"]
pub mod conversation;
pub mod devices;
pub mod driver;
pub mod file_system;
pub mod input;
pub mod kernel;
pub mod messages;
pub mod spec;

/// What is run on each input.
pub type Target = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Target); 13] = [
    ("balloon", devices::balloon),
    ("block", devices::block),
    ("console", devices::console),
    ("network", devices::network),
    ("rng", devices::rng),
    ("vsock", devices::vsock),
    ("file-system", file_system::requests),
    ("kernel", kernel::load),
    ("from-agent", messages::from_agent),
    ("to-agent", messages::to_agent),
    ("bundle", spec::bundle),
    ("process", spec::process),
    ("guest-spec", spec::guest),
];

/// The target of a name.
pub fn target(name: &str) -> Option<Target> {
    TARGETS.iter().find(|(known, _)| *known == name).map(|(_, target)| *target)
}
