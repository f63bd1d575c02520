//! Limits of requests and bytes a second.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Instant;

use crate::config::FileLimits;
use crate::sync::lock;
use crate::virtio::rate::Limit;

/// Has threads wait as long as the limits say.
pub struct Throttle {
    /// Nothing where there is no limit.
    state: Option<Mutex<State>>,
    lifted: Condvar,
}

struct State {
    limit: Limit,
    lifted: bool,
}

impl Throttle {
    /// Keeps the limits.
    pub fn new(limits: FileLimits) -> Self {
        let any = limits.bytes_per_second.or(limits.requests_per_second);
        let state = any.map(|_| Mutex::new(State { limit: limits.into(), lifted: false }));
        Self { state, lifted: Condvar::new() }
    }

    /// A request was served, of so many bytes with its reply.
    pub fn take(&self, bytes: usize) {
        if let Some(state) = &self.state {
            lock(state).limit.take(bytes, 1);
        }
    }

    /// Waits until another request may be served; false once none is to be any more.
    pub fn wait(&self) -> bool {
        let Some(state) = &self.state else { return true };
        let mut state = lock(state);
        while !state.lifted {
            // Asked anew each time: another thread may have taken what there was.
            let Some(until) = state.limit.wait() else { return true };
            let time = until.saturating_duration_since(Instant::now());
            let waited = self.lifted.wait_timeout(state, time);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        false
    }

    /// Nobody waits any more, nor is to serve any more.
    pub fn lift(&self) {
        if let Some(state) = &self.state {
            lock(state).lifted = true;
            self.lifted.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU64;
    use std::thread;

    use super::*;

    #[test]
    fn whoever_waits_goes_on_when_the_limit_is_lifted() {
        let a_byte = FileLimits { bytes_per_second: NonZeroU64::new(1), ..FileLimits::default() };
        let throttle = Throttle::new(a_byte);
        assert!(throttle.wait());
        throttle.take(1 << 40);
        thread::scope(|scope| {
            let waiters = [(); 2].map(|()| scope.spawn(|| throttle.wait()));
            throttle.lift();
            assert_eq!(waiters.map(|waiter| waiter.join().unwrap()), [false, false]);
        });
    }

    #[test]
    fn without_a_limit_nobody_waits() {
        let throttle = Throttle::new(FileLimits::default());
        throttle.take(usize::MAX);
        throttle.take(usize::MAX);
        assert!(throttle.wait());
        throttle.lift();
        assert!(throttle.wait());
    }
}
