//! What wakes a device at a time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// A timer: its descriptor is readable once its time has come.
#[derive(Debug)]
pub struct Timer {
    fd: OwnedFd,
    rings_at: Option<Instant>,
}

impl Timer {
    /// One that is not set.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { fd: timerfd_create(TimerfdClockId::Monotonic, flags)?, rings_at: None })
    }

    /// Sets it, unless it is to ring before that anyway.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn ring_at(&mut self, time: Instant) -> io::Result<()> {
        if self.rings_at.is_some_and(|rings_at| rings_at <= time) {
            return Ok(());
        }
        // A timer of nothing would be none.
        let wait = time.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1));
        let seconds = i64::try_from(wait.as_secs()).unwrap_or(i64::MAX);
        self.set(Timespec { tv_sec: seconds, tv_nsec: wait.subsec_nanos().into() })?;
        self.rings_at = Some(time);
        Ok(())
    }

    /// Unsets it.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn stop(&mut self) -> io::Result<()> {
        match self.rings_at.take() {
            Some(_) => self.set(Timespec::default()),
            None => Ok(()),
        }
    }

    /// Sees to it that it does not wake again for a time that has come.
    pub fn calm(&mut self) {
        if self.rings_at.is_some() && rustix::io::read(&self.fd, &mut [0; 8]).is_ok() {
            self.rings_at = None;
        }
    }

    fn set(&self, it_value: Timespec) -> io::Result<()> {
        let time = Itimerspec { it_interval: Timespec::default(), it_value };
        timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &time)?;
        Ok(())
    }
}

impl AsFd for Timer {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
