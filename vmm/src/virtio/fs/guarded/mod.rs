//! What stands between a hostile guest's requests and the passthrough file system.
//!
//! [`PassthroughFs`] hands names, offsets and flags on as they come and has one caching policy. This
//! wrapper:
//! * refuses every name that isn't the name of an entry (empty, `.`, `..`, with a slash) with
//!   `EINVAL`, so that each operation stays in the directory it names;
//! * refuses offsets and lengths that don't fit a file (`EINVAL`);
//! * lets through only those open flags that mean something to a file that exists; `O_CREAT`,
//!   `O_TMPFILE`, `O_PATH` and the like can't be had by way of an open;
//! * keeps the areas of the tree apart, which the guest sees as one file system, and says of each
//!   how long the guest may believe what it was told ([`area`]);
//! * makes files without a name, which the library can't ([`nameless`]);
//! * keeps what the guest adds within a limit, if there is one ([`space`], [`counted`]).

mod area;
mod checks;
mod counted;
mod file_system;
mod nameless;
mod space;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use virtiofsd::filesystem::{Context, Entry, FileSystem, OpenOptions, ZeroCopyWriter};
use virtiofsd::fuse::CreateIn;
use virtiofsd::oslib::ReadvFlags;
use virtiofsd::passthrough::PassthroughFs;

use area::{Known, known};
use checks::{OPEN_FLAGS, errno, open_flags};
use nameless::{Making, Nameless, Route};

pub use area::{ADDITIONS, MAX_MOUNT_INDEX};
pub use space::Space;
use space::{BLOCK, Given};

type Handle = u64;
type Node = u64;

/// The guarded file system. Clones are the same file system.
#[derive(Clone)]
pub struct GuardedFs {
    inner: Arc<PassthroughFs>,
    nameless: Arc<Nameless>,
    /// `/proc/self/fd`
    fd_directory: Arc<File>,
    /// What the guest may add, if that is limited.
    space: Option<Arc<Space>>,
}

impl GuardedFs {
    /// Guards a passthrough file system, and makes up to `nameless_limit` files without a name and
    /// handles of those. `fd_directory` is `/proc/self/fd`.
    pub fn new(
        inner: PassthroughFs,
        fd_directory: File,
        nameless_limit: usize,
        space: Option<Space>,
    ) -> Self {
        Self {
            inner: Arc::new(inner),
            nameless: Arc::new(Nameless::new(nameless_limit)),
            fd_directory: Arc::new(fd_directory),
            space: space.map(Arc::new),
        }
    }

    /// `FUSE_TMPFILE`: makes a file without a name in a directory and opens it.
    ///
    /// # Errors
    /// As `open(2)` with `O_TMPFILE`; `ENFILE` beyond the limit.
    pub fn make_nameless(
        &self,
        ctx: Context,
        directory: Node,
        request: &CreateIn,
    ) -> io::Result<(Entry, Handle, OpenOptions)> {
        let directory = known(directory);
        let making = Making {
            flags: open_flags(request.flags, OPEN_FLAGS | libc::O_EXCL),
            mode: request.mode,
            umask: request.umask,
        };
        let make = |directory: &File| nameless::make(directory, &ctx, making);
        let make = || {
            let file = self.with_directory(ctx, directory, make)?;
            let status = rustix::fs::fstat(&file)?;
            let (node, handle) = self.nameless.add(directory, file)?;
            let blocks = status.st_blocks.cast_unsigned().saturating_mul(BLOCK);
            Ok((Given { node, number: status.st_ino, blocks, handles: 1 }, handle))
        };
        let (Given { node: inode, .. }, handle) =
            self.make(ctx, directory.id, make, |(given, _)| *given)?;
        let Route::Nameless(file) = self.nameless.route(inode)? else {
            return Err(errno(libc::ESTALE));
        };
        let entry = Entry {
            inode,
            generation: 0,
            attr: file.attributes()?,
            attr_timeout: file.timeout(),
            entry_timeout: Duration::ZERO,
        };
        Ok((entry, handle, OpenOptions::empty()))
    }

    /// Who serves a request about a file that the guest may have opened.
    fn route(&self, node: Node, handle: Option<Handle>) -> io::Result<Route> {
        match handle {
            Some(handle) => self.nameless.route_open(node, handle),
            None => self.nameless.route(node),
        }
    }

    /// Runs `action` with a descriptor of a directory, which the library lends to whoever reads from
    /// one of its handles.
    fn with_directory<T>(
        &self,
        ctx: Context,
        directory: Known,
        action: impl FnOnce(&File) -> io::Result<T>,
    ) -> io::Result<T> {
        let (handle, _) = self.inner.opendir(ctx, directory.id, libc::O_RDONLY as u32)?;
        let handle = handle.ok_or_else(|| errno(libc::EBADF))?;
        let mut borrower = Borrower { action: Some(action), result: None };
        let lent = self.inner.read(ctx, directory.id, handle, &mut borrower, 0, 0, None, 0);
        self.inner.releasedir(ctx, directory.id, 0, handle)?;
        lent?;
        borrower.result.unwrap_or_else(|| Err(errno(libc::EIO)))
    }

    /// Links a nameless file. Gives what the library then knows under that name, and whether it is
    /// the nameless file from now on.
    fn name(
        &self,
        ctx: Context,
        node: Node,
        file: &nameless::NamelessFile,
        parent: Known,
        name: &CStr,
    ) -> io::Result<(Entry, bool)> {
        let link = |directory: &File| file.link(&self.fd_directory, directory, name);
        self.with_directory(ctx, parent, link)?;
        let entry = self.inner.lookup(ctx, parent.id, name)?;
        // Another may have taken the name in between. The file has had it all the same; it stays
        // without one as far as the library knows.
        let named = file.is(&entry.attr).unwrap_or(false) && self.nameless.name(node, entry.inode);
        Ok((entry, named))
    }

    /// Prepares what the library has found for the guest: a file that the guest knows as a nameless
    /// one keeps its node id. The library's reference goes back if the guest doesn't get it, unless
    /// it is `kept` for the nameless file.
    fn tell(&self, ctx: Context, mut entry: Entry, id: u64, kept: bool) -> Entry {
        if let Some(node) = self.nameless.reference(id) {
            entry.inode = node;
            if !kept {
                self.forget_in_library(ctx, id, 1);
            }
        }
        entry
    }

    /// Turns the library's answer about `name` in `parent` into the guest's.
    fn adopt(&self, ctx: Context, parent: Known, name: &CStr, entry: Entry) -> Entry {
        let id = entry.inode;
        self.tell(ctx, parent.adopt(name, entry), id, false)
    }
}

/// Takes what it is lent to an action.
struct Borrower<F, T> {
    action: Option<F>,
    result: Option<io::Result<T>>,
}

impl<T, F: FnOnce(&File) -> io::Result<T>> ZeroCopyWriter for Borrower<F, T> {
    fn read_from_file_at(
        &mut self,
        file: &File,
        _count: usize,
        _offset: u64,
        _flags: Option<ReadvFlags>,
    ) -> io::Result<usize> {
        if let Some(action) = self.action.take() {
            self.result = Some(action(file));
        }
        Ok(0)
    }
}
