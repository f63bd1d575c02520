//! Files of a cgroup that tell when they change: cgroup.events and memory.events.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::statistics::keyed;

/// Longest content, in bytes: a few names with a number each.
const MAX_LENGTH: usize = 4096;

/// An open file that polls with `POLLPRI` when it has changed since it was last read.
#[derive(Debug)]
pub struct Notices {
    file: File,
}

impl Notices {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: File::open(path)? })
    }

    /// The number behind a name, now. 0 for a name that isn't there.
    pub fn read(&self, name: &str) -> u64 {
        let mut bytes = [0; MAX_LENGTH];
        // The cgroup can't go before its container does.
        let length = self.file.read_at(&mut bytes, 0).unwrap_or(0);
        keyed(&String::from_utf8_lossy(&bytes[..length])).get(name).copied().unwrap_or(0)
    }
}

impl AsFd for Notices {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}
