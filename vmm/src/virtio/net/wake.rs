//! What wakes the device from the host's side.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll::{self, EventFlags};
use virtio_queue::{Queue, QueueT};

use crate::GuestMemory;
use crate::virtio::timer::Timer;

/// What one direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// The driver's doorbell.
    Driver,
    /// The tap: a frame, or that it takes one.
    Tap,
    /// A time, which may have come.
    Until(Instant),
}

/// An epoll instance with the tap, while it is of interest, and a timer.
///
/// A tap that isn't of interest isn't watched at all, because the end of its interface is reported
/// to whoever watches, interested or not.
#[derive(Debug)]
pub(super) struct Wake {
    epoll: OwnedFd,
    timer: Timer,
    watched: EventFlags,
}

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = Timer::new()?;
        epoll::add(&epoll, &timer, epoll::EventData::new_u64(0), EventFlags::IN)?;
        Ok(Self { epoll, timer, watched: EventFlags::empty() })
    }

    pub(super) fn events(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    /// Arranges to be woken for what the two directions wait for.
    pub(super) fn arrange(
        &mut self,
        tap: BorrowedFd<'_>,
        receive: Wait,
        transmit: Wait,
    ) -> io::Result<()> {
        let mut flags = EventFlags::empty();
        flags.set(EventFlags::IN, receive == Wait::Tap);
        flags.set(EventFlags::OUT, transmit == Wait::Tap);
        self.watch(tap, flags)?;
        let times = [receive, transmit].into_iter().filter_map(|wait| match wait {
            Wait::Until(time) => Some(time),
            _ => None,
        });
        match times.min() {
            Some(time) => self.timer.ring_at(time),
            None => Ok(()),
        }
    }

    /// Nothing is waited for any more.
    pub(super) fn rest(&mut self, tap: BorrowedFd<'_>) -> io::Result<()> {
        self.watch(tap, EventFlags::empty())?;
        self.timer.stop()
    }

    /// Sees to it that the timer does not wake again for a time that has come.
    pub(super) fn calm(&mut self) {
        self.timer.calm();
    }

    fn watch(&mut self, tap: BorrowedFd<'_>, flags: EventFlags) -> io::Result<()> {
        if flags == self.watched {
            return Ok(());
        }
        let data = epoll::EventData::new_u64(0);
        if flags.is_empty() {
            epoll::delete(&self.epoll, tap)?;
        } else if self.watched.is_empty() {
            epoll::add(&self.epoll, tap, data, flags)?;
        } else {
            epoll::modify(&self.epoll, tap, data, flags)?;
        }
        self.watched = flags;
        Ok(())
    }
}

/// Asks the driver to ring when it brings buffers; `None` if it just has.
pub(super) fn wait_for_driver(
    memory: &GuestMemory,
    queue: &mut Queue,
) -> Result<Option<Wait>, String> {
    if queue.enable_notification(memory).map_err(|e| e.to_string())? {
        queue.disable_notification(memory).map_err(|e| e.to_string())?;
        return Ok(None);
    }
    Ok(Some(Wait::Driver))
}
