//! epoll(7) with tokens.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::buffer::spare_capacity;
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// What a descriptor is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interest {
    /// To be readable.
    Read,
    /// To be writable.
    Write,
}

/// Descriptors that are waited for, each under a token. Each wait is for one event: a descriptor that
/// isn't wanted is silent, even if its other end hangs up.
#[derive(Debug)]
pub struct Poller {
    epoll: OwnedFd,
}

impl Poller {
    /// A poller of no descriptor.
    ///
    /// # Errors
    /// As epoll_create1(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self { epoll: epoll::create(CreateFlags::CLOEXEC)? })
    }

    /// Adds a descriptor, silent until it is armed. It leaves by being closed.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn add(&self, descriptor: impl AsFd, token: u64) -> io::Result<()> {
        // A hang-up is told even so, but once only.
        let silent = EventFlags::ONESHOT;
        Ok(epoll::add(&self.epoll, descriptor, EventData::new_u64(token), silent)?)
    }

    /// Waits for a descriptor's next event.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn arm(&self, descriptor: impl AsFd, token: u64, interest: Interest) -> io::Result<()> {
        let flags = match interest {
            Interest::Read => EventFlags::IN | EventFlags::RDHUP,
            Interest::Write => EventFlags::OUT,
        };
        let data = EventData::new_u64(token);
        Ok(epoll::modify(&self.epoll, descriptor, data, flags | EventFlags::ONESHOT)?)
    }

    /// Adds a descriptor whose every readiness to be read is told, for as long as it lasts.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch(&self, descriptor: impl AsFd, token: u64) -> io::Result<()> {
        let flags = EventFlags::IN | EventFlags::RDHUP;
        Ok(epoll::add(&self.epoll, descriptor, EventData::new_u64(token), flags)?)
    }

    /// Adds a file of the kernel's of which every change is told, once it has been read.
    ///
    /// # Errors
    /// As epoll_ctl(2).
    pub fn watch_changes(&self, file: impl AsFd, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.epoll, file, EventData::new_u64(token), EventFlags::PRI)?)
    }

    /// Stops watching a descriptor that stays open.
    pub fn forget(&self, descriptor: impl AsFd) {
        // One that isn't there is as good as forgotten.
        let _ = epoll::delete(&self.epoll, descriptor);
    }

    /// Waits for events and gives their tokens.
    ///
    /// # Errors
    /// As epoll_wait(2), but not `EINTR`.
    pub fn wait(&self) -> io::Result<Vec<u64>> {
        let mut events = Vec::with_capacity(64);
        rustix::io::retry_on_intr(|| epoll::wait(&self.epoll, spare_capacity(&mut events), None))?;
        Ok(events.iter().map(|event: &epoll::Event| event.data.u64()).collect())
    }
}
