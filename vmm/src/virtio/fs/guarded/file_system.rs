//! The guarded file system as the library's server sees it: each operation checked, sent to whoever
//! serves the file, and its answer turned into the guest's numbers.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};

use super::area::{Entries, Known, known};
use super::checks::{OPEN_FLAGS, entry_name, errno, file_range, open_flags};
use super::counted::{NewFile, known_file, new_file};
use super::nameless::{NAMELESS_BIT, Route};
use super::{GuardedFs, Handle, Node};

impl FileSystem for GuardedFs {
    type Inode = Node;
    type Handle = Handle;
    type DirIter = Entries;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.begin_anew(|| self.inner.init(capable))
    }

    fn destroy(&self) {
        self.begin_anew(|| self.inner.destroy());
    }

    fn lookup(&self, ctx: Context, parent: Node, name: &CStr) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        let entry = self.look_up(ctx, || self.inner.lookup(ctx, parent.id, name))?;
        Ok(self.adopt(ctx, parent, name, entry))
    }

    fn forget(&self, ctx: Context, node: Node, count: u64) {
        if node & NAMELESS_BIT == 0 {
            self.forget_in_library(ctx, known(node).id, count);
        } else {
            self.forget_nameless(ctx, node, count);
        }
    }

    fn batch_forget(&self, ctx: Context, requests: Vec<(Node, u64)>) {
        let counted = self.space.is_some();
        let (one_by_one, mut library): (Vec<_>, Vec<_>) =
            requests.into_iter().partition(|(node, _)| counted || node & NAMELESS_BIT != 0);
        for (node, count) in one_by_one {
            self.forget(ctx, node, count);
        }
        for (node, _) in &mut library {
            *node = known(*node).id;
        }
        self.inner.batch_forget(ctx, library);
    }

    fn getattr(
        &self,
        ctx: Context,
        node: Node,
        handle: Option<Handle>,
    ) -> io::Result<(Attr, Duration)> {
        match self.route(node, handle)? {
            Route::Nameless(file) => Ok((file.attributes()?, file.timeout())),
            Route::Library(known) => {
                let (attr, _) = self.inner.getattr(ctx, known.id, handle)?;
                Ok((known.attributes(attr), known.timeout()))
            }
        }
    }

    fn setattr(
        &self,
        ctx: Context,
        node: Node,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let cuts = valid.contains(SetattrValid::SIZE);
        if cuts {
            file_range(attr.size, 0)?;
        }
        match self.route(node, handle)? {
            Route::Nameless(file) => {
                self.cut(node, cuts, &file, || file.set_attributes(&attr, valid))?;
                Ok((file.attributes()?, file.timeout()))
            }
            Route::Library(known) => {
                let set = || self.inner.setattr(ctx, known.id, attr, handle, valid);
                let blocks = self.blocks(ctx, known.id, handle);
                let (attr, _) = self.cut(known.id, cuts, &blocks, set)?;
                Ok((known.attributes(attr), known.timeout()))
            }
        }
    }

    fn readlink(&self, ctx: Context, node: Node) -> io::Result<Vec<u8>> {
        self.inner.readlink(ctx, known(node).id)
    }

    fn symlink(
        &self,
        ctx: Context,
        target: &CStr,
        parent: Node,
        name: &CStr,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        let make = || self.inner.symlink(ctx, target, parent.id, name, extensions);
        let entry = self.make(ctx, parent.id, make, new_file)?;
        Ok(self.adopt(ctx, parent, name, entry))
    }

    fn mknod(
        &self,
        ctx: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        let make = || self.inner.mknod(ctx, parent.id, name, mode, rdev, umask, extensions);
        let entry = self.make(ctx, parent.id, make, new_file)?;
        Ok(self.adopt(ctx, parent, name, entry))
    }

    fn mkdir(
        &self,
        ctx: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        let make = || self.inner.mkdir(ctx, parent.id, name, mode, umask, extensions);
        let entry = self.make(ctx, parent.id, make, new_file)?;
        Ok(self.adopt(ctx, parent, name, entry))
    }

    fn unlink(&self, ctx: Context, parent: Node, name: &CStr) -> io::Result<()> {
        entry_name(name)?;
        self.inner.unlink(ctx, known(parent).id, name)
    }

    fn rmdir(&self, ctx: Context, parent: Node, name: &CStr) -> io::Result<()> {
        entry_name(name)?;
        self.inner.rmdir(ctx, known(parent).id, name)
    }

    fn rename(
        &self,
        ctx: Context,
        old_parent: Node,
        old_name: &CStr,
        new_parent: Node,
        new_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        entry_name(old_name)?;
        entry_name(new_name)?;
        let (old, new) = (known(old_parent).id, known(new_parent).id);
        // What is left behind on an overlay's layer is a file of its own.
        let makes = flags & libc::RENAME_WHITEOUT != 0;
        let rename = || self.inner.rename(ctx, old, old_name, new, new_name, flags);
        self.move_name(ctx, new, makes, rename)
    }

    fn link(&self, ctx: Context, node: Node, parent: Node, name: &CStr) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        match self.nameless.route(node)? {
            Route::Nameless(file) => {
                let link = || self.name(ctx, node, &file, parent, name);
                let given = |(entry, _): &(Entry, bool)| known_file(entry);
                let (entry, named) = self.make(ctx, parent.id, link, given)?;
                let id = entry.inode;
                Ok(self.tell(ctx, parent.adopt(name, entry), id, named))
            }
            Route::Library(known) => {
                let make = || self.inner.link(ctx, known.id, parent.id, name);
                let entry = self.make(ctx, parent.id, make, known_file)?;
                Ok(self.adopt(ctx, parent, name, entry))
            }
        }
    }

    fn open(
        &self,
        ctx: Context,
        node: Node,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let flags = open_flags(flags, OPEN_FLAGS);
        match self.nameless.route(node)? {
            Route::Nameless(file) => {
                let open = || {
                    let opened = file.reopen(&self.fd_directory, flags)?;
                    self.nameless.add_handle(node, opened)
                };
                let cuts = flags & libc::O_TRUNC as u32 != 0;
                let handle = self.cut(node, cuts, &file, || self.hand_out(node, open))?;
                Ok((Some(handle), OpenOptions::empty()))
            }
            Route::Library(known) => {
                let (handle, options) = self.open_in_library(ctx, known.id, kill_priv, flags)?;
                Ok((handle, known.open_options(options)))
            }
        }
    }

    fn create(
        &self,
        ctx: Context,
        parent: Node,
        name: &CStr,
        mode: u32,
        kill_priv: bool,
        flags: u32,
        umask: u32,
        extensions: Extensions,
    ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> {
        entry_name(name)?;
        let parent = known(parent);
        let flags = open_flags(flags, OPEN_FLAGS | libc::O_EXCL);
        let file = NewFile { mode, kill_priv, flags, umask };
        let (entry, handle, options) =
            self.create_in_library(ctx, parent.id, name, file, extensions)?;
        let entry = self.adopt(ctx, parent, name, entry);
        let options = known(entry.inode).open_options(options);
        Ok((entry, handle, options))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        writer: W,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        flags: u32,
    ) -> io::Result<usize> {
        file_range(offset, size.into())?;
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(file) => file.read(writer, size, offset),
            Route::Library(Known { id, .. }) => {
                self.inner.read(ctx, id, handle, writer, size, offset, lock_owner, flags)
            }
        }
    }

    fn write<R: ZeroCopyReader>(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        reader: R,
        size: u32,
        offset: u64,
        lock_owner: Option<u64>,
        delayed: bool,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<usize> {
        file_range(offset, size.into())?;
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(file) => {
                let append = !delayed && flags & libc::O_APPEND as u32 != 0;
                let range = (offset, size.into());
                let write = || file.write(reader, size, offset, kill_priv, append);
                self.grow(node, range, &file, write)
            }
            Route::Library(Known { id, .. }) => {
                let write = || {
                    self.inner.write(
                        ctx, id, handle, reader, size, offset, lock_owner, delayed, kill_priv,
                        flags,
                    )
                };
                let range = (offset, size.into());
                self.grow(id, range, &self.blocks(ctx, id, Some(handle)), write)
            }
        }
    }

    fn flush(&self, ctx: Context, node: Node, handle: Handle, lock_owner: u64) -> io::Result<()> {
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(_) => Ok(()),
            Route::Library(Known { id, .. }) => self.inner.flush(ctx, id, handle, lock_owner),
        }
    }

    fn fsync(&self, ctx: Context, node: Node, datasync: bool, handle: Handle) -> io::Result<()> {
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(file) => file.sync(datasync),
            Route::Library(Known { id, .. }) => self.inner.fsync(ctx, id, datasync, handle),
        }
    }

    fn fallocate(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        file_range(offset, length)?;
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(file) => {
                let allocate = || file.allocate(mode, offset, length);
                self.allocate(node, mode, (offset, length), &file, allocate)
            }
            Route::Library(Known { id, .. }) => {
                let allocate = || self.inner.fallocate(ctx, id, handle, mode, offset, length);
                let blocks = self.blocks(ctx, id, Some(handle));
                self.allocate(id, mode, (offset, length), &blocks, allocate)
            }
        }
    }

    fn release(
        &self,
        ctx: Context,
        node: Node,
        flags: u32,
        handle: Handle,
        flush: bool,
        flock_release: bool,
        lock_owner: Option<u64>,
    ) -> io::Result<()> {
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(_) => {
                self.nameless.release(node, handle)?;
                self.closed(node);
            }
            Route::Library(Known { id, .. }) => {
                self.inner.release(ctx, id, flags, handle, flush, flock_release, lock_owner)?;
                self.closed(id);
            }
        }
        Ok(())
    }

    fn statfs(&self, ctx: Context, node: Node) -> io::Result<libc::statvfs64> {
        let mut figures = match self.nameless.route(node)? {
            Route::Nameless(file) => file.file_system(),
            Route::Library(Known { id, .. }) => self.inner.statfs(ctx, id),
        }?;
        self.limit_room(&mut figures);
        Ok(figures)
    }

    fn setxattr(
        &self,
        ctx: Context,
        node: Node,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra_flags: SetxattrFlags,
    ) -> io::Result<()> {
        let length = name.count_bytes() + value.len();
        match self.nameless.route(node)? {
            Route::Nameless(file) => {
                let set = || file.set_attribute(name, value, flags, extra_flags);
                self.attach(node, length, &file, set)
            }
            Route::Library(Known { id, .. }) => {
                let set = || self.inner.setxattr(ctx, id, name, value, flags, extra_flags);
                self.attach(id, length, &self.blocks(ctx, id, None), set)
            }
        }
    }

    fn getxattr(
        &self,
        ctx: Context,
        node: Node,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        match self.nameless.route(node)? {
            Route::Nameless(file) => file.attribute(name, size),
            Route::Library(Known { id, .. }) => self.inner.getxattr(ctx, id, name, size),
        }
    }

    fn listxattr(&self, ctx: Context, node: Node, size: u32) -> io::Result<ListxattrReply> {
        match self.nameless.route(node)? {
            Route::Nameless(file) => file.attribute_names(size),
            Route::Library(Known { id, .. }) => self.inner.listxattr(ctx, id, size),
        }
    }

    fn removexattr(&self, ctx: Context, node: Node, name: &CStr) -> io::Result<()> {
        match self.nameless.route(node)? {
            Route::Nameless(file) => self.cut(node, true, &file, || file.remove_attribute(name)),
            Route::Library(Known { id, .. }) => {
                let remove = || self.inner.removexattr(ctx, id, name);
                self.cut(id, true, &self.blocks(ctx, id, None), remove)
            }
        }
    }

    fn opendir(
        &self,
        ctx: Context,
        node: Node,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let id = known(node).id;
        self.hand_out(id, || self.inner.opendir(ctx, id, open_flags(flags, OPEN_FLAGS)))
    }

    fn readdir(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        size: u32,
        offset: u64,
    ) -> io::Result<Self::DirIter> {
        let node = known(node);
        let inner = self.inner.readdir(ctx, node.id, handle, size, offset)?;
        Ok(Entries { inner, area: node.area })
    }

    fn fsyncdir(&self, ctx: Context, node: Node, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsyncdir(ctx, known(node).id, datasync, handle)
    }

    fn releasedir(&self, ctx: Context, node: Node, flags: u32, handle: Handle) -> io::Result<()> {
        let id = known(node).id;
        self.inner.releasedir(ctx, id, flags, handle)?;
        self.closed(id);
        Ok(())
    }

    fn lseek(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        match self.nameless.route_open(node, handle)? {
            Route::Nameless(file) => file.seek(offset, whence),
            Route::Library(Known { id, .. }) => self.inner.lseek(ctx, id, handle, offset, whence),
        }
    }

    fn copyfilerange(
        &self,
        ctx: Context,
        source: Node,
        source_handle: Handle,
        source_offset: u64,
        target: Node,
        target_handle: Handle,
        target_offset: u64,
        length: u64,
        flags: u64,
    ) -> io::Result<usize> {
        file_range(source_offset, length)?;
        file_range(target_offset, length)?;
        let source = self.nameless.route_open(source, source_handle)?;
        let target = self.nameless.route_open(target, target_handle)?;
        let (Route::Library(source), Route::Library(target)) = (source, target) else {
            // The guest's kernel then copies by itself.
            return Err(errno(libc::EXDEV));
        };
        let copy = |length| {
            self.inner.copyfilerange(
                ctx,
                source.id,
                source_handle,
                source_offset,
                target.id,
                target_handle,
                target_offset,
                length,
                flags,
            )
        };
        let blocks = self.blocks(ctx, target.id, Some(target_handle));
        self.grow_some(target.id, length, &blocks, copy)
    }

    fn syncfs(&self, ctx: Context, node: Node) -> io::Result<()> {
        match self.nameless.route(node)? {
            Route::Nameless(file) => file.sync(false),
            Route::Library(Known { id, .. }) => self.inner.syncfs(ctx, id),
        }
    }
}
