//! The host's wall clock: when it jumps, the guest's has to be set again.
//!
//! It jumps when somebody sets it, and when a host that was suspended goes on. A timer of the wall clock
//! tells of both (`TFD_TIMER_CANCEL_ON_SET` of timerfd_create(2)). How far it has jumped shows in its
//! distance to the monotonic clock, which the guest's goes by, and which stands still in a suspended
//! host. What is less than a [`JUMP`] is left alone: the guest's own programs see every step.

use std::io;
use std::os::fd::AsFd;

use nix::time::{ClockId, clock_gettime};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use tokio::io::Interest;

use super::events::{Event, Sources};
use super::readable;

/// What is too far, in nanoseconds.
const JUMP: u64 = 1_000_000_000;

/// A time that no test and no user waits for, in seconds since 1970: the year 2242.
const NEVER: i64 = 1 << 33;

/// Nanoseconds since 1970, and since a time that stays the same while the host runs.
#[derive(Debug, Clone, Copy)]
struct Reading {
    wall: i64,
    monotonic: i64,
}

impl Reading {
    fn now() -> io::Result<Self> {
        let read = |clock| -> io::Result<i64> {
            let time = clock_gettime(clock)?;
            Ok(time.tv_sec().saturating_mul(1_000_000_000).saturating_add(time.tv_nsec()))
        };
        let (wall, monotonic) = (read(ClockId::CLOCK_REALTIME)?, read(ClockId::CLOCK_MONOTONIC)?);
        Ok(Self { wall, monotonic })
    }

    fn distance(self) -> i64 {
        self.wall.saturating_sub(self.monotonic)
    }
}

/// What the guest was told of the time.
#[derive(Debug, Default)]
pub struct GuestClock {
    /// The distance of the host's clocks at that time.
    distance: Option<i64>,
}

impl GuestClock {
    /// The time that the guest is told when it starts, in nanoseconds since 1970.
    ///
    /// # Errors
    /// There is no such clock.
    pub fn first(&mut self) -> io::Result<i64> {
        let now = Reading::now()?;
        self.distance = Some(now.distance());
        Ok(now.wall)
    }

    /// The time that it is to be told now, if the host's clock has jumped since it was told last.
    ///
    /// # Errors
    /// As [`first`](Self::first).
    pub fn anew(&mut self) -> io::Result<Option<i64>> {
        Ok(self.anew_at(Reading::now()?))
    }

    fn anew_at(&mut self, now: Reading) -> Option<i64> {
        let jumped = self.distance?.abs_diff(now.distance()) >= JUMP;
        jumped.then(|| {
            self.distance = Some(now.distance());
            now.wall
        })
    }
}

impl Sources {
    /// Reports whenever the host's wall clock has been set, or went on after a suspend.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn watch_clock(&self) -> io::Result<()> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        let never = Timespec { tv_sec: NEVER, tv_nsec: 0 };
        let once = Itimerspec { it_interval: Timespec::default(), it_value: never };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        timerfd_settime(&timer, flags, &once)?;
        let timer = readable::register(timer)?;
        let sender = self.sender();
        tokio::task::spawn_local(async move {
            loop {
                let next = timer.async_io(Interest::READABLE, |timer| {
                    match rustix::io::read(timer.as_fd(), &mut [0; 8]) {
                        // It stays set.
                        Ok(_) | Err(rustix::io::Errno::CANCELED) => Ok(()),
                        Err(error) => Err(error.into()),
                    }
                });
                if next.await.is_err() || sender.send(Event::ClockWasSet).await.is_err() {
                    return;
                }
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: i64 = 1_000_000_000;

    #[test]
    fn a_guest_is_told_of_jumps_either_way_once() {
        let mut clock = GuestClock::default();
        let at = |wall, monotonic| Reading { wall: wall * SECOND, monotonic: monotonic * SECOND };
        assert_eq!(clock.anew_at(at(1000, 10)), None, "it is not there yet");
        clock.distance = Some(at(1000, 10).distance());
        assert_eq!(clock.anew_at(at(5000, 4010)), None, "time has passed");
        // A suspend of an hour, then the clock set back by two.
        assert_eq!(clock.anew_at(at(8600, 4010)), Some(8600 * SECOND));
        assert_eq!(clock.anew_at(at(8601, 4011)), None);
        assert_eq!(clock.anew_at(at(1401, 4011)), Some(1401 * SECOND));
        assert_eq!(clock.anew_at(at(1402, 4012)), None);
    }

    #[test]
    fn less_than_a_second_is_no_jump() {
        let mut clock = GuestClock { distance: Some(0) };
        for wall in [SECOND - 1, 1 - SECOND] {
            assert_eq!(clock.anew_at(Reading { wall, monotonic: 0 }), None);
        }
        for (wall, monotonic) in [(i64::MAX, i64::MIN), (i64::MIN, i64::MAX)] {
            assert_eq!(clock.anew_at(Reading { wall, monotonic }), Some(wall));
        }
    }

    #[test]
    fn nothing_has_jumped_since_just_now() {
        let mut clock = GuestClock::default();
        let told = clock.first().expect("a clock");
        assert!(told > 1_700_000_000 * SECOND, "{told}");
    }
}
