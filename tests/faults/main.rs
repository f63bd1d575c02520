//! Faults: whatever dies, stops, fills up or runs out, nothing is left on the host, callers are told,
//! and `kiln delete --force` works.
//!
//! `docs/reliability.md` has what is promised for each. These tests need root, QEMU, gcc, util-linux, a
//! static busybox at /bin/busybox, and the guest's kernel and agent, as those in `tests/kiln` do.
//! `make faults` runs them with more and larger figures.

// What fails here is the test.
#![allow(clippy::expect_used)]

mod clocks;
mod crowd;
mod disk;
mod guests;
mod host;
mod kills;
mod pods;
#[path = "../escape/script.rs"]
#[allow(dead_code, reason = "these tests use a part of it")]
mod script;
mod shortage;
#[path = "../kiln/stage.rs"]
#[allow(dead_code, reason = "these tests use a part of it")]
mod stage;
mod verbs;

/// A number from the environment, for longer runs.
fn from_environment(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is no number: {text:?}")))
}
