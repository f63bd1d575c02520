//! Operations that may add to the host's file systems, or give back: each is counted where that is
//! limited, and goes straight to whoever carries it out where it isn't.

use std::ffi::CStr;
use std::io;

use virtiofsd::filesystem::{Context, FileSystem};
use virtiofsd::passthrough::PassthroughFs;

use super::nameless::NamelessFile;
use super::space::{BLOCK, Blocks, Growth};
use super::{GuardedFs, Handle, Node};

impl GuardedFs {
    /// What makes something: a file that `node` names, or a name of it.
    pub(super) fn make<T>(
        &self,
        action: impl FnOnce() -> io::Result<T>,
        node: impl FnOnce(&T) -> Node,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.make(action, node),
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

    /// An extended attribute.
    pub(super) fn attach<T>(
        &self,
        name: &CStr,
        value: &[u8],
        action: impl FnOnce() -> io::Result<T>,
    ) -> io::Result<T> {
        match &self.space {
            Some(space) => space.attach((name.count_bytes() + value.len()) as u64, action),
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

    /// The library has given a reference to a file.
    pub(super) fn looked_up(&self, id: u64) {
        if let Some(space) = &self.space {
            space.looked_up(id);
        }
    }

    /// Gives references to a file back to the library.
    pub(super) fn forget_in_library(&self, ctx: Context, id: u64, count: u64) {
        if let Some(space) = &self.space {
            let attributes = || self.inner.getattr(ctx, id, None);
            let gone = || attributes().is_ok_and(|(attributes, _)| attributes.nlink == 0);
            space.forgotten(id, count, gone);
        }
        self.inner.forget(ctx, id, count);
    }

    /// The library has given a handle of a file or directory.
    pub(super) fn opened(&self, id: u64) {
        if let Some(space) = &self.space {
            space.opened(id);
        }
    }

    /// The library has taken a handle back.
    pub(super) fn closed(&self, id: u64) {
        if let Some(space) = &self.space {
            space.closed(id);
        }
    }

    /// The guest has forgotten everything.
    pub(super) fn forget_all(&self) {
        self.nameless.clear();
        if let Some(space) = &self.space {
            space.reset();
        }
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
