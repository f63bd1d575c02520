//! Files without a name (`O_TMPFILE`), which the library can neither make nor learn of: it finds
//! every file by its name in a directory.
//!
//! A nameless file has a node id of its own, with [`NAMELESS_BIT`] set, and is served from here, over
//! the descriptor that it was made with. Once the guest gives it a name (`linkat`), the library learns
//! of it under that name; from then on this node id stands for the library's: what is asked about it
//! goes to the library, and what the library tells of that file goes to the guest with this node id, so
//! that to the guest it stays one file. Descriptors that the guest has opened before go on being
//! served from here.
//!
//! Each nameless file costs an open file, and so does each descriptor that the guest opens of one;
//! beyond the limit given the guest sees `ENFILE`.

mod file;

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::area::{Known, known};
use super::checks::errno;

pub use file::{Making, NamelessFile, make};

/// Set in the node ids and handles of nameless files, and in no other.
pub const NAMELESS_BIT: u64 = 1 << 63;

/// Who serves a request.
pub enum Route {
    /// The library, which knows the file by this.
    Library(Known),
    /// This module.
    Nameless(NamelessFile),
}

/// A nameless file that the guest knows.
struct Node {
    file: Arc<File>,
    /// References that the guest has to give back with `FUSE_FORGET`.
    lookups: u64,
    /// The library's node id, once the file has a name; one of the library's references is held.
    named: Option<u64>,
}

#[derive(Default)]
struct Table {
    nodes: BTreeMap<u64, Node>,
    handles: BTreeMap<u64, (u64, Arc<File>)>,
    by_library: BTreeMap<u64, u64>,
    made: u64,
}

/// The nameless files of a file system.
pub struct Nameless {
    table: Mutex<Table>,
    /// Whether any file in the table has got a name: else there is nothing to translate.
    any_named: AtomicBool,
    limit: usize,
}

impl Nameless {
    /// None yet, and never more than `limit` files and handles together.
    pub fn new(limit: usize) -> Self {
        Self { table: Mutex::default(), any_named: AtomicBool::new(false), limit }
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        // Each change is a single insertion or removal: a panic leaves nothing half done.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Forgets all.
    pub fn clear(&self) {
        *self.table() = Table::default();
        self.any_named.store(false, Ordering::Release);
    }

    /// Registers a new file in `directory`'s area with one reference and one handle; returns its
    /// node id and the handle.
    ///
    /// # Errors
    /// `ENFILE` beyond the limit.
    pub fn add(&self, directory: Known, file: File) -> io::Result<(u64, u64)> {
        let mut table = self.table();
        let node = table.next_id(self.limit)? | directory.area.bits();
        let file = Arc::new(file);
        table.nodes.insert(node, Node { file: Arc::clone(&file), lookups: 1, named: None });
        let handle = table.next_id(self.limit)?;
        table.handles.insert(handle, (node, file));
        Ok((node, handle))
    }

    /// Who serves a request about a file.
    pub fn route(&self, node: u64) -> io::Result<Route> {
        if node & NAMELESS_BIT == 0 {
            return Ok(Route::Library(known(node)));
        }
        let table = self.table();
        let found = table.nodes.get(&node).ok_or_else(|| errno(libc::EBADF))?;
        let area = known(node).area;
        Ok(match found.named {
            Some(id) => Route::Library(Known { id, area }),
            None => Route::Nameless(NamelessFile { file: Arc::clone(&found.file), area }),
        })
    }

    /// Who serves a request about a file that the guest has opened as `handle`.
    pub fn route_open(&self, node: u64, handle: u64) -> io::Result<Route> {
        if handle & NAMELESS_BIT == 0 {
            return self.route(node);
        }
        let table = self.table();
        match table.handles.get(&handle) {
            Some((owner, file)) if *owner == node => {
                let area = known(node).area;
                Ok(Route::Nameless(NamelessFile { file: Arc::clone(file), area }))
            }
            _ => Err(errno(libc::EBADF)),
        }
    }

    /// Registers another descriptor of a nameless file; returns its handle.
    ///
    /// # Errors
    /// `ENFILE` beyond the limit, `EBADF` if the guest doesn't know the file.
    pub fn add_handle(&self, node: u64, file: File) -> io::Result<u64> {
        let mut table = self.table();
        if !table.nodes.contains_key(&node) {
            return Err(errno(libc::EBADF));
        }
        let handle = table.next_id(self.limit)?;
        table.handles.insert(handle, (node, Arc::new(file)));
        Ok(handle)
    }

    /// Closes a handle.
    ///
    /// # Errors
    /// `EBADF` if there is none.
    pub fn release(&self, node: u64, handle: u64) -> io::Result<()> {
        let mut table = self.table();
        if table.handles.get(&handle).is_none_or(|(owner, _)| *owner != node) {
            return Err(errno(libc::EBADF));
        }
        table.handles.remove(&handle);
        Ok(())
    }

    /// Takes references back. Returns the library's node id of which a reference is no longer
    /// needed, if so.
    #[must_use = "the library's reference must be given back"]
    pub fn forget(&self, node: u64, count: u64) -> Option<u64> {
        let mut table = self.table();
        let found = table.nodes.get_mut(&node)?;
        found.lookups = found.lookups.saturating_sub(count);
        if found.lookups > 0 {
            return None;
        }
        let named = table.nodes.remove(&node)?.named?;
        if table.by_library.get(&named) == Some(&node) {
            table.by_library.remove(&named);
        }
        self.any_named.store(!table.by_library.is_empty(), Ordering::Release);
        Some(named)
    }

    /// The file has got a name under which the library knows it as `id`, of which a reference comes
    /// with the call. Returns false, and the reference stays the caller's, if it had one already.
    pub fn name(&self, node: u64, id: u64) -> bool {
        let mut table = self.table();
        let Some(found) = table.nodes.get_mut(&node).filter(|found| found.named.is_none()) else {
            return false;
        };
        found.named = Some(id);
        table.by_library.insert(id, node);
        self.any_named.store(true, Ordering::Release);
        true
    }

    /// The node id by which the guest knows a file that the library knows as `id`, if that is a
    /// nameless file's; the guest gets one more reference to it.
    pub fn reference(&self, id: u64) -> Option<u64> {
        if !self.any_named.load(Ordering::Acquire) {
            return None;
        }
        let mut table = self.table();
        let node = *table.by_library.get(&id)?;
        let found = table.nodes.get_mut(&node)?;
        found.lookups = found.lookups.saturating_add(1);
        Some(node)
    }
}

impl Table {
    fn next_id(&mut self, limit: usize) -> io::Result<u64> {
        if self.nodes.len() + self.handles.len() >= limit {
            return Err(errno(libc::ENFILE));
        }
        // Ids are not used twice: 2^48 of them outlast any guest.
        self.made += 1;
        Ok(NAMELESS_BIT | self.made)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: u64 = 1;

    fn file() -> File {
        tempfile::tempfile().unwrap()
    }

    #[test]
    fn a_file_goes_to_the_library_once_it_has_a_name() {
        let nameless = Nameless::new(8);
        let (node, handle) = nameless.add(known(ROOT), file()).unwrap();
        assert!(matches!(nameless.route(node), Ok(Route::Nameless(_))));
        assert_eq!(nameless.reference(77), None);
        assert!(nameless.name(node, 77));
        assert!(!nameless.name(node, 78));
        assert!(matches!(nameless.route(node), Ok(Route::Library(Known { id: 77, .. }))));
        assert!(matches!(nameless.route_open(node, handle), Ok(Route::Nameless(_))));
        assert_eq!(nameless.reference(77), Some(node));
        assert_eq!(nameless.forget(node, 1), None);
        assert_eq!(nameless.forget(node, 1), Some(77));
        assert_eq!(nameless.reference(77), None);
        assert!(nameless.route(node).is_err());
    }

    #[test]
    fn handles_belong_to_their_file_and_count_against_the_limit() {
        let nameless = Nameless::new(5);
        let (one, handle) = nameless.add(known(ROOT), file()).unwrap();
        let (two, _) = nameless.add(known(ROOT), file()).unwrap();
        assert!(nameless.route_open(two, handle).is_err());
        assert!(nameless.release(two, handle).is_err());
        let third = nameless.add_handle(one, file()).unwrap();
        let full = nameless.add_handle(one, file()).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENFILE));
        nameless.release(one, third).unwrap();
        assert!(nameless.release(one, third).is_err());
        nameless.add_handle(two, file()).unwrap();
    }
}
