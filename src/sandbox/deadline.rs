//! Limits on time in which only that time counts in which this process could have acted.
//!
//! A sandbox may stand still as a whole: stopped by signals, frozen with its cgroup, or because this
//! host is a machine that somebody paused. The clocks go on meanwhile, and a guest that stood still
//! with its monitor would be late the moment that both go on. So a limit is counted in short slices,
//! and of one that ended long ago nobody saw the end: it is begun anew. (While the host itself is
//! suspended `CLOCK_MONOTONIC` stands still, and with it everything here.)

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

/// The longest time that is counted at once.
const SLICE: Duration = Duration::from_secs(1);

/// A limit on time.
#[derive(Debug)]
pub struct Deadline {
    left: Duration,
    /// When the slice that is being counted ends.
    slice_end: Option<Instant>,
}

impl Deadline {
    /// A limit that begins with the first call of [`passed`](Self::passed).
    pub fn after(limit: Duration) -> Self {
        Self { left: limit, slice_end: None }
    }

    /// Returns once the limit has passed. A call that is given up loses nothing: the next goes on.
    pub async fn passed(&mut self) {
        while !self.left.is_zero() {
            let slice = self.left.min(SLICE);
            let end = *self.slice_end.get_or_insert_with(|| Instant::now() + slice);
            sleep_until(end).await;
            self.slice_end = None;
            if end.elapsed() < SLICE {
                self.left -= slice;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_runtime<T>(future: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        runtime.expect("runtime").block_on(future)
    }

    #[test]
    fn interrupted_waits_add_up() {
        let mut deadline = Deadline::after(Duration::from_millis(60));
        let begin = Instant::now();
        let interruptions = with_runtime(async {
            let mut interruptions = 0;
            while tokio::time::timeout(Duration::from_millis(10), deadline.passed()).await.is_err()
            {
                interruptions += 1;
            }
            interruptions
        });
        assert!(begin.elapsed() >= Duration::from_millis(60));
        assert!(interruptions > 0 && deadline.left.is_zero(), "{interruptions}");
    }

    #[test]
    fn time_that_nobody_saw_pass_does_not_count() {
        let limit = Duration::from_millis(50);
        let mut deadline = Deadline::after(limit);
        with_runtime(async {
            let glance = tokio::time::timeout(Duration::from_millis(1), deadline.passed());
            assert!(glance.await.is_err());
            // As if the process had been stopped.
            std::thread::sleep(SLICE + Duration::from_millis(100));
            let glance = tokio::time::timeout(Duration::from_millis(1), deadline.passed());
            assert!(glance.await.is_err());
            assert_eq!(deadline.left, limit);
            deadline.passed().await;
        });
    }
}
