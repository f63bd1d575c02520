//! Limits of bytes and packets a second.
//!
//! Each is a token bucket, kept as one point in time: when it will be full again (the "virtual
//! scheduling" form of the generic cell rate algorithm, ITU-T I.371). A frame is let through while
//! the bucket isn't empty, whatever its size, and what it takes too much is waited for afterwards. So
//! no frame is too large for any limit.

use std::num::NonZeroU64;
use std::time::{Duration, Instant};

use crate::config::RateConfig;

/// How much time's worth a bucket holds.
const BURST: Duration = Duration::from_millis(50);

/// The limits of one direction.
#[derive(Debug)]
pub(super) struct Limit {
    bytes: Option<Bucket>,
    packets: Option<Bucket>,
}

#[derive(Debug)]
struct Bucket {
    per_second: NonZeroU64,
    full_at: Option<Instant>,
}

impl Limit {
    pub(super) fn new(config: RateConfig) -> Self {
        let bucket = |per_second| Bucket { per_second, full_at: None };
        Self {
            bytes: config.bytes_per_second.map(bucket),
            packets: config.packets_per_second.map(bucket),
        }
    }

    /// Until when the next frame has to wait, if it has to.
    pub(super) fn wait(&self) -> Option<Instant> {
        self.wait_at(Instant::now)
    }

    /// A frame was let through.
    pub(super) fn take(&mut self, bytes: usize, packets: u64) {
        self.take_at(Instant::now, bytes, packets);
    }

    // The clock isn't read where there is no limit.
    fn wait_at(&self, now: impl FnOnce() -> Instant) -> Option<Instant> {
        let until = self.buckets().filter_map(Bucket::has_some_at).max()?;
        (until > now()).then_some(until)
    }

    fn take_at(&mut self, now: impl FnOnce() -> Instant, bytes: usize, packets: u64) {
        if self.buckets().next().is_none() {
            return;
        }
        let now = now();
        for (bucket, count) in [(&mut self.bytes, bytes as u64), (&mut self.packets, packets)] {
            if let Some(bucket) = bucket {
                bucket.take(now, count);
            }
        }
    }

    fn buckets(&self) -> impl Iterator<Item = &Bucket> {
        self.bytes.iter().chain(&self.packets)
    }
}

impl Bucket {
    /// Since when it isn't empty.
    fn has_some_at(&self) -> Option<Instant> {
        self.full_at?.checked_sub(BURST)
    }

    fn take(&mut self, now: Instant, count: u64) {
        let nanoseconds = u128::from(count) * 1_000_000_000 / u128::from(self.per_second.get());
        let time = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        let from = self.full_at.map_or(now, |full_at| full_at.max(now));
        // What no clock can show is as good as for ever, which the last time known is not far from.
        self.full_at = from.checked_add(time).or(Some(from));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limit(bytes: u64, packets: u64) -> Limit {
        Limit::new(RateConfig {
            bytes_per_second: NonZeroU64::new(bytes),
            packets_per_second: NonZeroU64::new(packets),
        })
    }

    /// Lets frames through for `time`, always as soon as may be, and returns how many.
    fn count(limit: &mut Limit, bytes: usize, packets: u64, time: Duration) -> u64 {
        let begin = Instant::now();
        let mut now = begin;
        let mut count = 0;
        while now < begin + time {
            match limit.wait_at(|| now) {
                Some(until) => now = until,
                None => {
                    limit.take_at(|| now, bytes, packets);
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
    fn the_stricter_limit_counts() {
        let time = Duration::from_secs(10);
        assert_eq!(count(&mut limit(1000, 1_000_000), 100, 1, time), 100 + 1);
        assert_eq!(count(&mut limit(u64::MAX, 10), 100, 1, time), 100 + 1);
    }

    #[test]
    fn a_frame_larger_than_the_bucket_passes_and_is_paid_for() {
        let mut limit = limit(100, 0);
        let now = Instant::now();
        assert_eq!(limit.wait_at(|| now), None);
        limit.take_at(|| now, 1000, 1);
        assert_eq!(limit.wait_at(|| now), Some(now + Duration::from_secs(10) - BURST));
        limit.take_at(|| now, usize::MAX, u64::MAX);
        assert!(limit.wait_at(|| now).is_some());
    }
}
