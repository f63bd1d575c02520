//! What a container may write to standard output and error, counted by all processes that copy it: the
//! monitor, and those that stand for execs.
//!
//! They share the offset of an open file, which one of them at a time adds to (`fdget_pos` of `fs/file.c`),
//! and whose contents are the limit. None of them takes anything from the guest but
//! the bytes that it counts.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::num::NonZeroU64;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;

use crate::limits::Bytes;
use crate::process::memory_file;

/// A container's output, counted.
#[derive(Debug)]
pub struct Budget {
    count: File,
    limit: Bytes,
}

impl Budget {
    /// One of which nothing is used.
    ///
    /// # Errors
    /// The host is out of descriptors or memory.
    pub fn new(limit: Bytes) -> io::Result<Self> {
        let memory = memory_file("kiln-output")?;
        // The kernel guards the offset of what was opened, and not of a memory file as it is made.
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        let count = File::options().read(true).write(true).open(path)?;
        count.write_all_at(&limit.0.get().to_le_bytes(), 0)?;
        Ok(Self { count, limit })
    }

    /// The same, for another process.
    ///
    /// # Errors
    /// The host is out of descriptors.
    pub fn share(&self) -> io::Result<OwnedFd> {
        Ok(self.count.try_clone()?.into())
    }

    /// What [`share`](Self::share) gave.
    ///
    /// # Errors
    /// It is no such file.
    pub fn join(shared: OwnedFd) -> io::Result<Self> {
        let count = File::from(shared);
        let mut limit = [0; 8];
        count.read_exact_at(&mut limit, 0)?;
        let limit = NonZeroU64::new(u64::from_le_bytes(limit));
        Ok(Self { count, limit: Bytes(limit.ok_or(io::ErrorKind::InvalidData)?) })
    }

    /// Counts bytes that the guest has written; gives how many of them are within the limit.
    pub fn admit(&self, length: usize) -> usize {
        let before = self.add(length).map_or(u64::MAX, |after| after - length as u64);
        let left = self.limit.0.get().saturating_sub(before);
        usize::try_from(left).unwrap_or(usize::MAX).min(length)
    }

    /// Whether more was written than may be.
    pub fn is_exceeded(&self) -> bool {
        self.add(0).is_none_or(|count| count > self.limit.0.get())
    }

    /// What is said once it is.
    pub fn reason(&self) -> String {
        exceeded(self.limit)
    }

    /// The count with so much added, unless that is more than an offset can be.
    fn add(&self, length: usize) -> Option<u64> {
        let length = i64::try_from(length).ok()?;
        (&self.count).seek(SeekFrom::Current(length)).ok()
    }
}

/// What is said of a step that wrote more than this.
pub fn exceeded(limit: Bytes) -> String {
    format!(
        "the step wrote more than its output limit of {limit}, and it was ended: if it needs more, \
         raise --output-limit (io.kiln.output-limit)"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn budget(limit: u64) -> Budget {
        Budget::new(Bytes(NonZeroU64::new(limit).expect("a limit"))).expect("a budget")
    }

    #[test]
    fn who_shares_it_counts_together() {
        let one = budget(10);
        let other = Budget::join(one.share().expect("shared")).expect("joined");
        assert_eq!([one.admit(4), other.admit(4)], [4, 4]);
        assert!(!one.is_exceeded() && !other.is_exceeded());
        assert_eq!([one.admit(4), other.admit(1)], [2, 0]);
        assert!(one.is_exceeded() && other.is_exceeded());
        assert!(other.reason().contains("10 bytes"), "{}", other.reason());
    }

    #[test]
    fn no_count_is_too_large() {
        let budget = budget(1 << 40);
        (0..5).for_each(|_| {
            budget.admit(usize::MAX / 2);
        });
        assert!(budget.is_exceeded());
        assert_eq!(budget.admit(1), 0);
    }

    #[test]
    fn every_byte_is_counted_once() {
        let budget = budget(100_000);
        let admitted: usize = std::thread::scope(|scope| {
            let count = || (0..1000).map(|_| budget.admit(77)).sum::<usize>();
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(count)).collect();
            threads.into_iter().map(|thread| thread.join().expect("counted")).sum()
        });
        assert_eq!(admitted, 100_000);
    }
}
