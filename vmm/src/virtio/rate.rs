//! Limits of bytes and operations a second.
//!
//! Each is a token bucket, kept as one point in time: when it will be full again (the "virtual
//! scheduling" form of the generic cell rate algorithm, ITU-T I.371). An operation is let through while
//! the bucket isn't empty, whatever its size, and what it takes too much is waited for afterwards. So
//! none is too large for any limit.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use crate::config::{DiskLimits, FileLimits, RateConfig};

/// How much time's worth a bucket holds unless it is told otherwise.
const BURST: Duration = Duration::from_millis(50);

/// Limits that hold together: of bytes, and of operations (packets, requests).
#[derive(Debug, Default)]
pub struct Limit {
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    per_second: NonZeroU64,
    /// How much time's worth it holds.
    burst: Duration,
    full_at: Option<Instant>,
}

impl Limit {
    /// Limits of so many bytes and operations a second. Of bytes that were not used, `burst_bytes`
    /// can be caught up on; of anything else, a twentieth of a second's worth.
    fn new(
        bytes: Option<NonZeroU64>,
        burst_bytes: Option<NonZeroU64>,
        operations: Option<NonZeroU64>,
    ) -> Self {
        let bucket = |per_second| Bucket { per_second, burst: BURST, full_at: None };
        let bytes = bytes.map(|per_second| match burst_bytes {
            Some(burst) => {
                Bucket { burst: time_for(burst.get(), per_second), ..bucket(per_second) }
            }
            None => bucket(per_second),
        });
        Self { bytes, operations: operations.map(bucket) }
    }

    /// Until when the next operation has to wait, if it has to.
    pub fn wait(&self) -> Option<Instant> {
        self.wait_at(Instant::now)
    }

    /// Something was let through.
    pub fn take(&mut self, bytes: usize, operations: u64) {
        self.take_at(Instant::now, bytes, operations);
    }

    // The clock isn't read where there is no limit.
    fn wait_at(&self, now: impl FnOnce() -> Instant) -> Option<Instant> {
        let until = self.buckets().filter_map(Bucket::has_some_at).max()?;
        (until > now()).then_some(until)
    }

    fn take_at(&mut self, now: impl FnOnce() -> Instant, bytes: usize, operations: u64) {
        if self.buckets().next().is_none() {
            return;
        }
        let now = now();
        for (bucket, count) in [(&mut self.bytes, bytes as u64), (&mut self.operations, operations)]
        {
            if let Some(bucket) = bucket {
                bucket.take(now, count);
            }
        }
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.bytes.iter().chain(&self.operations)
    }
}

impl From<RateConfig> for Limit {
    fn from(config: RateConfig) -> Self {
        Self::new(config.bytes_per_second, config.burst_bytes, config.packets_per_second)
    }
}

impl From<FileLimits> for Limit {
    fn from(limits: FileLimits) -> Self {
        Self::new(limits.bytes_per_second, None, limits.requests_per_second)
    }
}

impl From<DiskLimits> for Limit {
    fn from(limits: DiskLimits) -> Self {
        Self::new(limits.bytes_per_second, None, limits.requests_per_second)
    }
}

impl Bucket {
    /// Since when it isn't empty.
    fn has_some_at(&self) -> Option<Instant> {
        self.full_at?.checked_sub(self.burst)
    }

    fn take(&mut self, now: Instant, count: u64) {
        let time = time_for(count, self.per_second);
        let from = self.full_at.map_or(now, |full_at| full_at.max(now));
        // What no clock can show is as good as for ever, which the last time known is not far from.
        self.full_at = from.checked_add(time).or(Some(from));
    }
}

/// How long so much takes.
fn time_for(count: u64, per_second: NonZeroU64) -> Duration {
    let nanoseconds = u128::from(count) * 1_000_000_000 / u128::from(per_second.get());
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: u64, operations: u64) -> Limit {
        Limit::new(NonZeroU64::new(bytes), None, NonZeroU64::new(operations))
    }

    /// Lets operations through for `time`, always as soon as may be, and returns how many.
    fn count(limit: &mut Limit, bytes: usize, operations: u64, time: Duration) -> u64 {
        let begin = Instant::now();
        let mut now = begin;
        let mut count = 0;
        while now < begin + time {
            match limit.wait_at(|| now) {
                Some(until) => now = until,
                None => {
                    limit.take_at(|| now, bytes, operations);
                    count += 1;
                }
            }
        }
        count
    }

    #[test]
    fn no_limit_never_waits() {
        let mut limit = limit(0, 0);
        limit.take(usize::MAX, u64::MAX);
        assert_eq!(limit.wait(), None);
    }

    #[test]
    fn the_rate_is_kept_and_a_burst_is_a_twentieth() {
        let time = Duration::from_secs(10);
        assert_eq!(count(&mut limit(1_000_000, 0), 1000, 1, time), 10_000 + 50);
        assert_eq!(count(&mut limit(0, 200), 1000, 1, time), 2000 + 10);
        assert_eq!(count(&mut limit(0, 200), 1000, 10, time), 200 + 1);
    }

    #[test]
    fn a_burst_may_be_larger_or_smaller() {
        let time = Duration::from_secs(10);
        for (burst, expected) in [(500_000, 10_000 + 500), (1000, 10_000 + 1), (1, 10_000 + 1)] {
            let rate = NonZeroU64::new(1_000_000);
            let mut limit = Limit::new(rate, NonZeroU64::new(burst), None);
            assert_eq!(count(&mut limit, 1000, 1, time), expected, "{burst}");
        }
    }

    #[test]
    fn the_stricter_limit_counts() {
        let time = Duration::from_secs(10);
        assert_eq!(count(&mut limit(1000, 1_000_000), 100, 1, time), 100 + 1);
        assert_eq!(count(&mut limit(u64::MAX, 10), 100, 1, time), 100 + 1);
    }

    #[test]
    fn what_is_larger_than_the_bucket_passes_and_is_paid_for() {
        let mut limit = limit(100, 0);
        let now = Instant::now();
        assert_eq!(limit.wait_at(|| now), None);
        limit.take_at(|| now, 1000, 1);
        assert_eq!(limit.wait_at(|| now), Some(now + Duration::from_secs(10) - BURST));
        limit.take_at(|| now, usize::MAX, u64::MAX);
        assert!(limit.wait_at(|| now).is_some());
    }
}
