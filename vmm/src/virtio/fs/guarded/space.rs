//! What the guest adds to the host's file systems, against a limit.
//!
//! Counted are the blocks that each operation adds to the file that it is about, [`INODE`] for
//! whatever it makes, and extended attributes at their length. Beyond the limit an operation fails
//! with `EDQUOT`, which tells a step its own limit from a host that is full.
//!
//! # What is given back
//! Of a file, what was added to it and no more: when it is cut, and when it is gone for good, without
//! a name and without a reference or a handle of the guest's. What was there before the guest came is
//! not the guest's to free, since on an overlay that may free nothing. So what is counted is never
//! less than what the guest has added, as long as the file system says truly how many blocks a file
//! has; it may be more: of a file that the guest has forgotten in between, of one that had no name at
//! first, and of attributes nothing is given back.
//!
//! What an overlay copies up of its lower layers at a first write is not counted: it shows as blocks
//! that were there before. It is bounded by the size of those layers.
//!
//! Operations that may add are done one after the other, so that each is told from the next.

use std::collections::HashMap;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::checks::errno;

/// What a name with its inode counts for, in bytes: on ext4 an inode of 256 and an entry of up to 264
/// in a directory, whose growth is not counted by itself.
pub const INODE: u64 = 1024;

/// What blocks are counted in, by `stat(2)`.
pub const BLOCK: u64 = 512;

/// What file systems allocate at least.
const CLUSTER: u64 = 4096;

/// Called when the limit is reached, once.
pub type OnFull = Box<dyn FnOnce() + Send>;

/// A limit and what has been counted.
pub struct Space {
    limit: u64,
    /// Whoever holds this carries out an operation that may add.
    adding: Mutex<()>,
    ledger: Mutex<Ledger>,
    on_full: Mutex<Option<OnFull>>,
}

#[derive(Debug, Default)]
struct Ledger {
    used: u64,
    /// By node id, as long as the guest has a reference or a handle, or something is counted.
    files: HashMap<u64, File>,
}

/// What is known of a file.
#[derive(Debug, Default)]
struct File {
    added: u64,
    lookups: u64,
    handles: u64,
    /// It has no name any more, nor can it get one.
    gone: bool,
}

/// The blocks of a file around an operation, in bytes.
pub trait Blocks {
    /// How many there are now.
    ///
    /// # Errors
    /// As `fstat(2)`.
    fn now(&self) -> io::Result<u64>;

    /// Whether a range of the file needs no more.
    fn covers(&self, offset: u64, length: u64) -> bool;
}

/// What an operation may add to a file: ranges are offset and length in bytes.
#[derive(Debug, Clone, Copy)]
pub enum Growth {
    /// Blocks for what it writes.
    Written((u64, u64)),
    /// Blocks that it asks for.
    Allocated((u64, u64)),
}

impl Growth {
    /// The most bytes.
    fn most(self) -> u64 {
        let (Self::Written((offset, length)) | Self::Allocated((offset, length))) = self;
        let end = offset.saturating_add(length).checked_next_multiple_of(CLUSTER);
        end.unwrap_or(u64::MAX) - offset / CLUSTER * CLUSTER
    }
}

impl Space {
    /// A limit in bytes. Nothing has been added yet.
    pub fn new(limit: u64, on_full: OnFull) -> Self {
        Self {
            limit,
            adding: Mutex::default(),
            ledger: Mutex::default(),
            on_full: Mutex::new(Some(on_full)),
        }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // Sums and counts: a panic between two of them leaves none that is no sum or count.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn adding(&self) -> MutexGuard<'_, ()> {
        self.adding.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How much more may be added, in bytes.
    pub fn room(&self) -> u64 {
        self.limit.saturating_sub(self.ledger().used)
    }

    fn refuse(&self) -> io::Error {
        let on_full = self.on_full.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(on_full) = on_full {
            on_full();
        }
        errno(libc::EDQUOT)
    }

    /// Carries out what may add to a file.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn grow<T>(
        &self,
        node: u64,
        growth: Growth,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        if growth.most() > self.room() {
            // What the file has may be written again; but where it really goes is seen only
            // afterwards (a handle may append whatever the request says), so that not more than
            // once.
            let is_there = match growth {
                Growth::Written((offset, length)) => {
                    self.ledger().used <= self.limit && blocks.covers(offset, length)
                }
                Growth::Allocated(_) => false,
            };
            if !is_there {
                return Err(self.refuse());
            }
        }
        self.settle(node, blocks, action)
    }

    /// Carries out what may write up to `length` bytes to a file, or less; it is told how many.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn grow_some<T>(
        &self,
        node: u64,
        length: u64,
        blocks: &impl Blocks,
        action: impl FnOnce(u64) -> io::Result<T>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        // Both ends may lie within a cluster.
        match self.room().saturating_sub(2 * CLUSTER) {
            0 if length > 0 => Err(self.refuse()),
            room => self.settle(node, blocks, || action(length.min(room))),
        }
    }

    /// Carries out what may free blocks of a file.
    ///
    /// # Errors
    /// The operation's own.
    pub fn cut<T>(
        &self,
        node: u64,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        self.settle(node, blocks, action)
    }

    fn settle<T>(
        &self,
        node: u64,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let before = blocks.now()?;
        let result = action();
        // An operation that failed may have added something. A file that can't be asked any more has
        // nothing that could be given back.
        let after = blocks.now().unwrap_or(before);
        let mut ledger = self.ledger();
        if after > before {
            ledger.add(node, after - before);
        } else if after < before {
            ledger.give_back(node, before - after);
        }
        result
    }

    /// Carries out what makes a file or a name of one; `node` names the file.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn make<T>(
        &self,
        action: impl FnOnce() -> io::Result<T>,
        node: impl FnOnce(&T) -> u64,
    ) -> io::Result<T> {
        let _adding = self.adding();
        if self.room() < INODE {
            return Err(self.refuse());
        }
        let made = action()?;
        self.ledger().add(node(&made), INODE);
        Ok(made)
    }

    /// Carries out what adds this much beside a file's blocks, for good.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn attach<T>(&self, length: u64, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _adding = self.adding();
        if self.room() < length {
            return Err(self.refuse());
        }
        let result = action()?;
        let mut ledger = self.ledger();
        ledger.used = ledger.used.saturating_add(length);
        Ok(result)
    }

    /// The guest has got a reference to a file.
    pub fn looked_up(&self, node: u64) {
        let mut ledger = self.ledger();
        let file = ledger.files.entry(node).or_default();
        file.lookups = file.lookups.saturating_add(1);
    }

    /// The guest gives references back; `gone` says whether the file has no name any more, and is
    /// asked only where that matters.
    pub fn forgotten(&self, node: u64, count: u64, gone: impl FnOnce() -> bool) {
        let mut ledger = self.ledger();
        let Some(file) = ledger.files.get_mut(&node) else { return };
        file.lookups = file.lookups.saturating_sub(count);
        if file.lookups == 0 {
            file.gone = file.added > 0 && gone();
            ledger.drop_unused(node);
        }
    }

    /// The guest has got a handle of a file.
    pub fn opened(&self, node: u64) {
        let mut ledger = self.ledger();
        let file = ledger.files.entry(node).or_default();
        file.handles = file.handles.saturating_add(1);
    }

    /// The guest gives a handle back.
    pub fn closed(&self, node: u64) {
        let mut ledger = self.ledger();
        let Some(file) = ledger.files.get_mut(&node) else { return };
        file.handles = file.handles.saturating_sub(1);
        ledger.drop_unused(node);
    }

    /// The guest has forgotten everything.
    pub fn reset(&self) {
        self.ledger().files.clear();
    }
}

impl Ledger {
    fn add(&mut self, node: u64, bytes: u64) {
        self.used = self.used.saturating_add(bytes);
        let file = self.files.entry(node).or_default();
        file.added = file.added.saturating_add(bytes);
    }

    fn give_back(&mut self, node: u64, bytes: u64) {
        let Some(file) = self.files.get_mut(&node) else { return };
        let bytes = bytes.min(file.added);
        file.added -= bytes;
        self.used = self.used.saturating_sub(bytes);
    }

    /// Forgets a file that the guest has no hold on; if it is gone, what it took is free.
    fn drop_unused(&mut self, node: u64) {
        let Some(file) = self.files.get(&node) else { return };
        if file.lookups > 0 || file.handles > 0 {
            return;
        }
        if file.gone {
            self.used = self.used.saturating_sub(file.added);
        }
        self.files.remove(&node);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    const FILE: u64 = 7;

    /// A file whose blocks the tests say.
    #[derive(Default)]
    struct Model {
        blocks: Cell<u64>,
        covers: bool,
    }

    impl Blocks for Model {
        fn now(&self) -> io::Result<u64> {
            Ok(self.blocks.get())
        }

        fn covers(&self, _offset: u64, _length: u64) -> bool {
            self.covers
        }
    }

    fn space(limit: u64) -> (Space, Arc<AtomicU32>) {
        let full = Arc::new(AtomicU32::new(0));
        let count = Arc::clone(&full);
        let on_full = move || {
            count.fetch_add(1, Ordering::Relaxed);
        };
        (Space::new(limit, Box::new(on_full)), full)
    }

    fn write(space: &Space, file: &Model, length: u64) -> io::Result<()> {
        let grown = file.blocks.get().saturating_add(length);
        space.grow(FILE, Growth::Written((0, length)), file, || {
            file.blocks.set(grown);
            Ok(())
        })
    }

    fn is_refused<T: std::fmt::Debug>(result: io::Result<T>) -> bool {
        result.unwrap_err().raw_os_error() == Some(libc::EDQUOT)
    }

    #[test]
    fn what_goes_beyond_is_refused_before_it_is_done_and_told_once() {
        let (space, full) = space(16 << 10);
        let file = Model::default();
        write(&space, &file, 12 << 10).unwrap();
        assert_eq!(space.room(), 4 << 10);
        assert!(is_refused(write(&space, &file, 5 << 10)));
        assert!(is_refused(write(&space, &file, u64::MAX)));
        assert_eq!((file.blocks.get(), full.load(Ordering::Relaxed)), (12 << 10, 1));
        write(&space, &file, 4 << 10).unwrap();
        assert!(is_refused(space.make(|| Ok(()), |()| 8)));
        assert!(is_refused(space.attach(1, || Ok(()))));
    }

    #[test]
    fn what_is_there_already_can_be_written_again() {
        let (space, _) = space(4 << 10);
        let file = Model { covers: true, ..Model::default() };
        write(&space, &file, 4 << 10).unwrap();
        let range = (0, 4 << 10);
        space.grow(FILE, Growth::Written(range), &file, || Ok(())).unwrap();
        assert_eq!(space.room(), 0);
        assert!(is_refused(space.grow(FILE, Growth::Allocated(range), &file, || Ok(()))));
        // One that then grows all the same is the last.
        write(&space, &file, 4 << 10).unwrap();
        assert!(is_refused(write(&space, &file, 4 << 10)));
    }

    #[test]
    fn some_of_it_is_written_where_all_is_too_much() {
        let (space, _) = space(64 << 10);
        let file = Model::default();
        let copy = |length| {
            space.grow_some(FILE, length, &file, |length| {
                file.blocks.set(file.blocks.get() + length);
                Ok(length)
            })
        };
        assert_eq!(copy(1 << 40).unwrap(), 56 << 10);
        assert!(is_refused(copy(1)));
    }

    #[test]
    fn a_file_that_is_gone_gives_back_what_was_added() {
        let (space, _) = space(64 << 10);
        let file = Model { blocks: Cell::new(1 << 20), ..Model::default() };
        space.make(|| Ok(()), |()| FILE).unwrap();
        space.looked_up(FILE);
        space.opened(FILE);
        write(&space, &file, 32 << 10).unwrap();
        let used = (32 << 10) + INODE;
        assert_eq!(space.room(), (64 << 10) - used);
        // Its name is gone, but it is open.
        space.forgotten(FILE, 1, || true);
        assert_eq!(space.room(), (64 << 10) - used);
        space.closed(FILE);
        assert_eq!(space.room(), 64 << 10);
        space.closed(FILE);
        assert_eq!(space.room(), 64 << 10);
    }

    #[test]
    fn a_file_that_still_has_a_name_gives_nothing_back() {
        let (space, _) = space(64 << 10);
        let file = Model::default();
        space.looked_up(FILE);
        write(&space, &file, 32 << 10).unwrap();
        space.forgotten(FILE, 1, || false);
        assert_eq!(space.room(), 32 << 10);
        // Known again, it has nothing that the guest is known to have added.
        space.looked_up(FILE);
        space.forgotten(FILE, 1, || true);
        assert_eq!(space.room(), 32 << 10);
    }

    #[test]
    fn cutting_gives_back_no_more_than_was_added() {
        let (space, _) = space(64 << 10);
        let file = Model { blocks: Cell::new(1 << 20), ..Model::default() };
        write(&space, &file, 8 << 10).unwrap();
        let cut = |to| {
            space.cut(FILE, &file, || {
                file.blocks.set(to);
                Ok(())
            })
        };
        cut((1 << 20) + 4096).unwrap();
        assert_eq!(space.room(), 60 << 10);
        cut(0).unwrap();
        assert_eq!(space.room(), 64 << 10);
    }
}
