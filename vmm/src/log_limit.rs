//! Keeps a guest from filling the log: of what it can repeat at will, the first few are logged and
//! then ever fewer.

use std::sync::atomic::{AtomicU64, Ordering};

/// How many are logged before it gets quiet.
const FIRST: u64 = 4;

/// Counts one kind of thing that a guest does.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(AtomicU64);

impl LogLimit {
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Counts it, and returns how many there have been if this one is to be logged.
    pub fn admit(&self) -> Option<u64> {
        let count = self.0.fetch_add(1, Ordering::Relaxed).wrapping_add(1);
        (count <= FIRST || count.is_power_of_two()).then_some(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_million_make_a_couple_of_dozen_lines() {
        let limit = LogLimit::new();
        let logged = (0..1_000_000).filter_map(|_| limit.admit()).collect::<Vec<_>>();
        assert_eq!(logged[..6], [1, 2, 3, 4, 8, 16]);
        assert!(logged.len() < 24);
    }
}
