//! Operations that may add to the host's file systems, or give back: each is counted where that is
//! limited, and goes straight to whoever carries it out where it isn't.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, Entry, Extensions, FileSystem, OpenOptions};
use virtiofsd::passthrough::PassthroughFs;

use super::area::Known;
use super::checks::{OPEN_FLAGS, open_flags};
use super::nameless::{NamelessFile, Route};
use super::space::{BLOCK, Blocks, Given, Growth};
use super::{GuardedFs, Handle, Node};

impl GuardedFs {
    /// What makes a file, or a name of one, in a directory of the library's; `given` says of which
    /// node the guest is told.
    pub(super) fn make<T>(
        &self,
        ctx: Context,
        directory: u64,
        action: impl FnOnce() -> io::Result<T>,
        given: impl FnOnce(&T) -> Given,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => {
                let blocks = self.blocks(ctx, directory, None);
                space.make(directory, &blocks, action, given, &|node| self.file_system(ctx, node))
            }
            None => action(),
        }
    }

    /// What has the library tell of a file.
    pub(super) fn look_up(
        &self,
        ctx: Context,
        action: impl FnOnce() -> io::Result<Entry>,
    ) -> io::Result<Entry> {
        match &self.space {
            Some(space) => space.look_up(action, known_file, &|node| self.file_system(ctx, node)),
            None => action(),
        }
    }

    /// What opens a file or directory.
    pub(super) fn hand_out<T>(
        &self,
        node: u64,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.open(node, action),
            None => action(),
        }
    }

    /// What opens a file of the library's, which it may cut.
    pub(super) fn open_in_library(
        &self,
        ctx: Context,
        id: u64,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let cuts = flags & libc::O_TRUNC as u32 != 0;
        let open = || self.inner.open(ctx, id, kill_priv, flags);
        let open = || self.hand_out(id, open);
        self.cut(id, cuts, &self.blocks(ctx, id, None), open)
    }

    /// Makes a file and opens it, or opens it if it is there.
    ///
    /// Where additions are counted, these are two operations of the library's: it would keep a reference,
    /// which nobody can give back, to a file that it has found but can't open.
    pub(super) fn create_in_library(
        &self,
        ctx: Context,
        parent: u64,
        name: &CStr,
        file: NewFile,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        let NewFile { mode, kill_priv, flags, umask } = file;
        if self.space.is_none() {
            return self.inner.create(ctx, parent, name, mode, kill_priv, flags, umask, extensions);
        }
        let mode = libc::S_IFREG | mode & 0o7777;
        let make = || self.inner.mknod(ctx, parent, name, mode, 0, umask, extensions);
        let entry = match self.make(ctx, parent, make, new_file) {
            Err(error) if is_there(&error) && flags & libc::O_EXCL as u32 == 0 => {
                self.look_up(ctx, || self.inner.lookup(ctx, parent, name))
            }
            made => made,
        }?;
        let flags = open_flags(flags, OPEN_FLAGS);
        match self.open_in_library(ctx, entry.inode, kill_priv, flags) {
            Ok((handle, options)) => Ok((entry, handle, options)),
            Err(error) => {
                self.forget_in_library(ctx, entry.inode, 1);
                Err(error)
            }
        }
    }

    /// What moves a name into a directory of the library's, and makes another if it `makes`.
    pub(super) fn move_name(
        &self,
        ctx: Context,
        directory: u64,
        makes: bool,
        action: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        match &self.space {
            Some(space) => {
                space.rename(directory, makes, &self.blocks(ctx, directory, None), action)
            }
            None => action(),
        }
    }

    /// What writes to a range (offset and length) of a file.
    pub(super) fn grow<T>(
        &self,
        node: Node,
        range: (u64, u64),
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.grow(node, Growth::Written(range), blocks, action),
            None => action(),
        }
    }

    /// What writes so much to a file, or less: it is told how much.
    pub(super) fn grow_some<T>(
        &self,
        node: Node,
        length: u64,
        blocks: &impl Blocks,
        action: impl FnOnce(u64) -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.grow_some(node, length, blocks, action),
            None => action(length),
        }
    }

    /// `fallocate(2)` of a range (offset and length) of a file.
    pub(super) fn allocate<T>(
        &self,
        node: Node,
        mode: u32,
        range: (u64, u64),
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        let frees = mode & libc::FALLOC_FL_PUNCH_HOLE as u32 != 0;
        match &self.space {
            Some(space) if frees => space.cut(node, blocks, action),
            Some(space) => space.grow(node, Growth::Allocated(range), blocks, action),
            None => action(),
        }
    }

    /// What may make a file shorter, if it `cuts`.
    pub(super) fn cut<T>(
        &self,
        node: Node,
        cuts: bool,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) if cuts => space.cut(node, blocks, action),
            _ => action(),
        }
    }

    /// What sets an extended attribute, of this length with its name.
    pub(super) fn attach<T>(
        &self,
        node: Node,
        length: usize,
        blocks: &impl Blocks,
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.attach(node, length as u64, blocks, action),
            None => action(),
        }
    }

    /// Has a file system's figures show no more room than there is for the guest.
    pub(super) fn limit_room(&self, figures: &mut libc::statvfs64) {
        if let Some(space) = &self.space {
            let room = space.room() / figures.f_frsize.max(1);
            figures.f_bfree = figures.f_bfree.min(room);
            figures.f_bavail = figures.f_bavail.min(room);
        }
    }

    /// Gives references to a file back to the library.
    pub(super) fn forget_in_library(&self, ctx: Context, id: u64, count: u64) {
        let Some(space) = &self.space else { return self.inner.forget(ctx, id, count) };
        let gone = || self.inner.getattr(ctx, id, None).is_ok_and(|(attr, _)| attr.nlink == 0);
        let forget = || {
            self.inner.forget(ctx, id, count);
            // The library's word counts: it may have more references than the guest was told of.
            !self.inner.getattr(ctx, id, None).is_err_and(|error| is_unknown(&error))
        };
        space.forget(id, gone, forget);
    }

    /// Takes references to a nameless file back.
    pub(super) fn forget_nameless(&self, ctx: Context, node: Node, count: u64) {
        let mut library = None;
        match &self.space {
            Some(space) => {
                let gone = || match self.nameless.route(node) {
                    Ok(Route::Nameless(file)) => file.attributes(),
                    Ok(Route::Library(Known { id, .. })) => {
                        self.inner.getattr(ctx, id, None).map(|(attributes, _)| attributes)
                    }
                    Err(error) => Err(error),
                };
                let gone = || gone().is_ok_and(|attributes| attributes.nlink == 0);
                let forget = || {
                    library = self.nameless.forget(node, count);
                    self.nameless.route(node).is_ok()
                };
                space.forget(node, gone, forget);
            }
            None => library = self.nameless.forget(node, count),
        }
        if let Some(id) = library {
            self.forget_in_library(ctx, id, 1);
        }
    }

    /// A handle of a node has been taken back.
    pub(super) fn closed(&self, node: Node) {
        if let Some(space) = &self.space {
            space.closed(node);
        }
    }

    /// What takes everything back that the guest has.
    pub(super) fn begin_anew<T>(&self, action: impl FnOnce() -> T) -> T {
        let action = || {
            self.nameless.clear();
            action()
        };
        match &self.space {
            Some(space) => space.reset(action),
            None => action(),
        }
    }

    /// The id of the file system that a node's file is in, if it has one.
    fn file_system(&self, ctx: Context, node: Node) -> Option<u64> {
        let figures = match self.nameless.route(node).ok()? {
            Route::Nameless(file) => file.file_system(),
            Route::Library(Known { id, .. }) => self.inner.statfs(ctx, id),
        };
        figures.ok().map(|figures| figures.f_fsid).filter(|id| *id != 0)
    }

    /// The blocks of a file of the library's, which is written through `handle` if it is written.
    pub(super) fn blocks(
        &self,
        ctx: Context,
        id: u64,
        handle: Option<Handle>,
    ) -> LibraryBlocks<'_> {
        LibraryBlocks { library: &self.inner, ctx, id, handle }
    }
}

/// What a file is made with.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewFile {
    pub mode: u32,
    pub kill_priv: bool,
    pub flags: u32,
    pub umask: u32,
}

/// The node of a file that was there, by the library's answer.
pub(super) fn known_file(entry: &Entry) -> Given {
    Given { node: entry.inode, number: entry.attr.ino, blocks: 0, handles: 0 }
}

/// The node of a file that was just made, by the library's answer.
pub(super) fn new_file(entry: &Entry) -> Given {
    Given { blocks: entry.attr.blocks.saturating_mul(BLOCK), ..known_file(entry) }
}

fn is_there(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EEXIST)
}

/// The library doesn't know the node.
fn is_unknown(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EBADF)
}

/// The blocks of a file that the library serves.
pub(super) struct LibraryBlocks<'a> {
    library: &'a PassthroughFs,
    ctx: Context,
    id: u64,
    handle: Option<Handle>,
}

impl Blocks for LibraryBlocks<'_> {
    fn now(&self) -> io::Result<u64> {
        let (attributes, _) = self.library.getattr(self.ctx, self.id, self.handle)?;
        Ok(attributes.blocks.saturating_mul(BLOCK))
    }

    fn covers(&self, offset: u64, length: u64) -> bool {
        let Some(handle) = self.handle else { return false };
        let whence = libc::SEEK_HOLE as u32;
        let hole = self.library.lseek(self.ctx, self.id, handle, offset, whence);
        hole.is_ok_and(|hole| hole >= offset.saturating_add(length))
    }
}

impl Blocks for NamelessFile {
    fn now(&self) -> io::Result<u64> {
        Ok(self.attributes()?.blocks.saturating_mul(BLOCK))
    }

    fn covers(&self, offset: u64, length: u64) -> bool {
        let hole = self.seek(offset, libc::SEEK_HOLE as u32);
        hole.is_ok_and(|hole| hole >= offset.saturating_add(length))
    }
}
