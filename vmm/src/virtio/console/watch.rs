//! A file descriptor of the host's that is watched while it is of interest.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

use crate::virtio::DeviceError;

/// What makes a descriptor worth waking up for.
#[derive(Debug, Clone, Copy)]
pub(super) enum Interest {
    Readable,
    Writable,
}

/// A descriptor, and whether an epoll instance watches it. One that isn't of interest isn't watched
/// at all, because a hang-up is reported to whoever watches, interested or not.
#[derive(Debug)]
pub(super) struct Watch {
    fd: OwnedFd,
    interest: Interest,
    watched: bool,
}

impl Watch {
    pub fn new(fd: OwnedFd, interest: Interest) -> Self {
        Self { fd, interest, watched: false }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Watches it or not. A file, which epoll doesn't take, is always ready and needs no watching.
    pub fn watch(&mut self, epoll: BorrowedFd<'_>, watched: bool) -> Result<(), DeviceError> {
        if watched == self.watched {
            return Ok(());
        }
        let flags = match self.interest {
            Interest::Readable => epoll::EventFlags::IN,
            Interest::Writable => epoll::EventFlags::OUT,
        };
        let changed = match watched {
            true => epoll::add(epoll, &self.fd, epoll::EventData::new_u64(0), flags),
            false => epoll::delete(epoll, &self.fd),
        };
        match changed {
            Ok(()) => self.watched = watched,
            Err(rustix::io::Errno::PERM) => {}
            Err(e) => {
                return Err(DeviceError::Host { what: "watch the console", source: e.into() });
            }
        }
        Ok(())
    }
}
