//! What the guest adds to the host's file systems, against a limit.
//!
//! Counted are the blocks that each operation adds to the file that it is about, and to the directory
//! that it changes; whatever is made, at [`INODE`] and the blocks that it comes with; and extended
//! attributes at their length, besides the blocks that they take. Beyond the limit an operation fails
//! with `EDQUOT`, which tells a step its own limit from a host that is full.
//!
//! # What is given back
//! Of a file, what was added to it and no more: when it is cut, and when it is gone for good, without
//! a name and without a node or a handle of the guest's, by whichever mount ([`ledger`]). What was there
//! before the guest came is not the guest's to free, since on an overlay that may free nothing. So what
//! is counted is never less than what the guest has added, as long as the file system says truly how
//! many blocks a file has; it may be more: of a file that the guest has forgotten in between, and of
//! attributes' lengths, nothing is given back.
//!
//! What an overlay copies up of its lower layers at a first write is not counted: it shows as blocks
//! that were there before. It is bounded by the size of those layers.
//!
//! # Order
//! Operations that may add, and those that move a name, are done one after the other, so that each is
//! told from the next. No file is given back while an operation is under way that may give
//! the guest a node or a handle. A request that only uses a file may still be under way then, and keeps
//! it until it is done.

mod ledger;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use super::checks::errno;
use ledger::Ledger;

/// What a name with its inode counts for, in bytes: on ext4 an inode of 256 and an entry of up to
/// 264.
pub const INODE: u64 = 1024;

/// What blocks are counted in, by `stat(2)`.
pub const BLOCK: u64 = 512;

/// What file systems allocate at least.
const CLUSTER: u64 = 4096;

/// The most that a directory grows by for one name: ext4 splits a block of its tree, and the one above.
const NAME: u64 = 2 * CLUSTER;

/// The most that something takes when it is made: a directory or a symbolic link has a block.
const MAKING: u64 = INODE + CLUSTER + NAME;

/// Called when the limit is reached, once.
pub type OnFull = Box<dyn FnOnce() + Send>;

/// A limit and what has been counted.
pub struct Space {
    limit: u64,
    /// Whoever holds this carries out an operation that may add.
    adding: Mutex<()>,
    /// Shared by those that may give the guest a node or a handle, until that is in the ledger;
    /// taken after `adding`.
    giving: RwLock<()>,
    ledger: Mutex<Ledger>,
    on_full: Mutex<Option<OnFull>>,
}

/// A node that the guest is given of a file.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// Its id.
    pub node: u64,
    /// The inode number on the host.
    pub number: u64,
    /// The blocks that it comes with, if it was just made; in bytes.
    pub blocks: u64,
    /// How many handles come with it.
    pub handles: u64,
}

/// Says the id of the file system that a node's file is in, if it has one.
pub type FileSystemOf<'a> = &'a dyn Fn(u64) -> Option<u64>;

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
            giving: RwLock::default(),
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
        self.limit.saturating_sub(self.ledger().used())
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
                    self.ledger().used() <= self.limit && blocks.covers(offset, length)
                }
                Growth::Allocated(_) => false,
            };
            if !is_there {
                return Err(self.refuse());
            }
        }
        self.settle(node, growth.most(), blocks, action)
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
            room => {
                let length = length.min(room);
                let most = length.saturating_add(2 * CLUSTER);
                self.settle(node, most, blocks, || action(length))
            }
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
        self.settle(node, 0, blocks, action)
    }

    /// Carries out what may add to or free of a file, up to `most` bytes.
    fn settle<T>(
        &self,
        node: u64,
        most: u64,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let before = blocks.now()?;
        let result = action();
        // An operation that failed may have added something. If the guest has forgotten the file in
        // between, nobody can be asked.
        let after = blocks.now().unwrap_or_else(|_| before.saturating_add(most));
        let mut ledger = self.ledger();
        if after > before {
            ledger.add(node, after - before);
        } else if after < before {
            ledger.give_back(node, before - after);
        }
        result
    }

    /// Carries out what makes a file or a name of one in a directory, whose blocks are given; `given`
    /// says of which node the guest is told.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn make<T>(
        &self,
        directory: u64,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
        given: impl FnOnce(&T) -> Given,
        file_system: FileSystemOf<'_>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        if self.room() < MAKING {
            return Err(self.refuse());
        }
        self.settle(directory, NAME, blocks, || {
            let _giving = self.giving.read().unwrap_or_else(PoisonError::into_inner);
            let result = action();
            let mut ledger = self.ledger();
            match &result {
                Ok(made) => {
                    let made = given(made);
                    ledger.give(made, file_system);
                    ledger.add(made.node, INODE.saturating_add(made.blocks));
                }
                Err(error) if makes_nothing(error) => {}
                // It may have been made and then not been found, for want of a descriptor.
                Err(_) => ledger.add_for_good(INODE + CLUSTER),
            }
            result
        })
    }

    /// Carries out what moves a name into a directory, whose blocks are given, and makes another one if
    /// it `makes`.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn rename<T>(
        &self,
        directory: u64,
        makes: bool,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        // A directory seldom grows by a name. If it does, that goes beyond the limit once at most.
        if self.ledger().used() > self.limit || (makes && self.room() < MAKING) {
            return Err(self.refuse());
        }
        let result = self.settle(directory, NAME, blocks, action)?;
        if makes {
            self.ledger().add_for_good(INODE);
        }
        Ok(result)
    }

    /// Carries out what adds an attribute of this length to a file; the length counts for good.
    ///
    /// # Errors
    /// `EDQUOT`, or the operation's own.
    pub fn attach<T>(
        &self,
        node: u64,
        length: u64,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let _adding = self.adding();
        let most = length.saturating_add(CLUSTER);
        if self.room() < most {
            return Err(self.refuse());
        }
        let result = self.settle(node, most, blocks, action)?;
        self.ledger().add_for_good(length);
        Ok(result)
    }

    /// Carries out what may give the guest a node.
    ///
    /// # Errors
    /// The operation's own.
    pub fn look_up<T>(
        &self,
        action: impl FnOnce() -> io::Result<T>,
        given: impl FnOnce(&T) -> Given,
        file_system: FileSystemOf<'_>,
    ) -> io::Result<T> {
        let _giving = self.giving.read().unwrap_or_else(PoisonError::into_inner);
        let found = action()?;
        self.ledger().give(given(&found), file_system);
        Ok(found)
    }

    /// Carries out what gives the guest a handle of a node.
    ///
    /// # Errors
    /// The operation's own.
    pub fn open<T>(&self, node: u64, action: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _giving = self.giving.read().unwrap_or_else(PoisonError::into_inner);
        let opened = action()?;
        self.ledger().opened(node);
        Ok(opened)
    }

    /// Carries out what takes references to a node back, which says whether the guest can still name
    /// it. Whether the file is `gone`, without any name, is asked before, and only where that matters.
    pub fn forget(&self, node: u64, gone: impl FnOnce() -> bool, action: impl FnOnce() -> bool) {
        let _alone = self.giving.write().unwrap_or_else(PoisonError::into_inner);
        let added = self.ledger().added(node) > 0;
        let gone = added && gone();
        if !action() {
            self.ledger().forgotten(node, gone);
        }
    }

    /// A handle of a node has been taken back.
    pub fn closed(&self, node: u64) {
        let _alone = self.giving.write().unwrap_or_else(PoisonError::into_inner);
        self.ledger().closed(node);
    }

    /// Carries out what takes back everything that the guest has.
    pub fn reset<T>(&self, action: impl FnOnce() -> T) -> T {
        let _alone = self.giving.write().unwrap_or_else(PoisonError::into_inner);
        self.ledger().clear();
        action()
    }

    /// How many nodes are remembered.
    #[cfg(test)]
    pub fn known_nodes(&self) -> usize {
        self.ledger().len()
    }
}

impl Ledger {
    fn give(&mut self, given: Given, file_system: FileSystemOf<'_>) {
        self.known(given.node, given.number, file_system);
        for _ in 0..given.handles {
            self.opened(given.node);
        }
    }
}

/// Whether an operation that fails like this has made nothing.
fn makes_nothing(error: &io::Error) -> bool {
    let errors = [
        libc::EACCES,
        libc::EBADF,
        libc::EDQUOT,
        libc::EEXIST,
        libc::EINVAL,
        libc::EMLINK,
        libc::ENAMETOOLONG,
        libc::ENOSPC,
        libc::ENOTDIR,
        libc::EOPNOTSUPP,
        libc::EPERM,
        libc::EROFS,
        libc::EXDEV,
    ];
    error.raw_os_error().is_some_and(|error| errors.contains(&error))
}
