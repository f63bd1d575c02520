//! What stands between a hostile guest's requests and the passthrough file system.
//!
//! [`PassthroughFs`] hands names, offsets and flags on as they come and has one caching policy. This
//! wrapper:
//! * refuses every name that isn't the name of an entry (empty, `.`, `..`, with a slash) with
//!   `EINVAL`, so that each operation stays in the directory it names;
//! * refuses offsets and lengths that don't fit a file (`EINVAL`);
//! * lets through only those open flags that mean something to a file that exists; `O_CREAT`,
//!   `O_TMPFILE`, `O_PATH` and the like can't be had by way of an open;
//! * says how long the guest may believe what it was told (see [`Caching`]).
//!
//! * keeps the areas of the tree apart (see [`Area`]), which the guest sees as one file system.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use virtiofsd::filesystem::{
    Context, DirEntry, DirectoryIterator, Entry, Extensions, FileSystem, FsOptions, GetxattrReply,
    ListxattrReply, OpenOptions, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, ROOT_ID, SetattrIn};
use virtiofsd::passthrough::PassthroughFs;

type Handle = u64;
type Node = u64;

/// Where a file lies: in the tree's top or its `rootfs/` (0), `mounts/` itself (1) or the mount of
/// index n (n + 2).
///
/// The guest could be told of the parts as file systems of their own (`FUSE_ATTR_SUBMOUNT`). But
/// Linux 6.12 gives such a submount neither POSIX ACLs nor `SB_NOSEC`
/// (`fs/fuse/inode.c:fuse_fill_super_submount`), and asks for a file's capabilities before each write
/// in it. So there is one file system for the guest, and what differs between its parts is kept in
/// the numbers: a node id is the library's with the area in bits 48 to 62, and an inode number is
/// the host's with the area mixed into the same bits, as two areas may be of different file systems
/// of the host that use the same numbers.
///
/// A guest that makes node ids up gains nothing by the area: it says how *it* may cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Area(u16);

impl Area {
    const ROOTFS: Self = Self(0);
    const MOUNTS: Self = Self(1);

    fn of_mount(index: u32) -> Option<Self> {
        (index <= MAX_MOUNT_INDEX).then(|| Self(index as u16 + 2))
    }

    fn bits(self) -> u64 {
        u64::from(self.0) << AREA_SHIFT
    }
}

/// The largest index that a mount may have.
pub const MAX_MOUNT_INDEX: u32 = (1 << 15) - 3;

const AREA_SHIFT: u32 = 48;
const AREA_MASK: u64 = ((1 << 15) - 1) << AREA_SHIFT;

/// How long a guest may believe what it was told.
///
/// That a name does *not* exist is never cached: a file that another container or the host makes is
/// found at the very next look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Caching {
    /// For names and attributes.
    timeout: Duration,
    /// Whether file contents outlive the last close. What the guest holds is dropped in any case
    /// when it sees that size or mtime have changed.
    keep_contents: bool,
}

/// The root file system is the guest's alone while the step runs. It may believe for long, as builds
/// look up the same few thousand names over and over (each look that must be asked again costs a
/// round trip), but not for ever: someone may copy a file into a running container.
const ROOTFS_CACHING: Caching = Caching { timeout: Duration::from_secs(60), keep_contents: true };

/// A mount may be written by other containers at the same time. A second is what NFS clients and
/// their users are used to with `actimeo`; contents are looked at anew on each open, so that what
/// was written before the other side's close is seen by whoever opens after it.
const MOUNT_CACHING: Caching = Caching { timeout: Duration::from_secs(1), keep_contents: false };

/// Flags that an open of a file or directory may carry.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_TRUNC
    | libc::O_DIRECT
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK
    | libc::O_LARGEFILE
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW;

fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Checks that a name is that of an entry in a directory.
fn entry_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Checks that a range lies in what a file can hold.
fn file_range(offset: u64, length: u64) -> io::Result<()> {
    let end = offset.checked_add(length).filter(|end| i64::try_from(*end).is_ok());
    end.map(|_| ()).ok_or_else(|| errno(libc::EINVAL))
}

fn open_flags(flags: u32, allowed: i32) -> u32 {
    flags & allowed.cast_unsigned()
}

/// A node id taken apart.
struct Known {
    /// The library's.
    id: u64,
    area: Area,
}

fn known(node: Node) -> Known {
    let area = Area(((node & AREA_MASK) >> AREA_SHIFT) as u16);
    Known { id: node & !AREA_MASK, area }
}

impl Known {
    fn caching(&self) -> Caching {
        if self.area == Area::ROOTFS { ROOTFS_CACHING } else { MOUNT_CACHING }
    }

    /// The area of what is found under `name` in this directory.
    fn area_of_child(&self, name: &CStr) -> Area {
        match self.area {
            Area::ROOTFS if self.id == ROOT_ID && name == c"mounts" => Area::MOUNTS,
            Area::MOUNTS => {
                let index = name.to_str().ok().and_then(|name| name.parse().ok());
                index.and_then(Area::of_mount).unwrap_or(Area::MOUNTS)
            }
            area => area,
        }
    }

    /// Turns the library's answer about `name` in this directory into the guest's.
    fn adopt(&self, name: &CStr, mut entry: Entry) -> Entry {
        let child = Known { id: entry.inode, area: self.area_of_child(name) };
        entry.inode |= child.area.bits();
        entry.attr = child.attributes(entry.attr);
        entry.entry_timeout = child.caching().timeout;
        entry.attr_timeout = child.caching().timeout;
        entry
    }

    fn attributes(&self, mut attr: Attr) -> Attr {
        attr.ino ^= self.area.bits();
        attr
    }

    fn open_options(&self, mut options: OpenOptions) -> OpenOptions {
        options.set(OpenOptions::KEEP_CACHE, self.caching().keep_contents);
        options
    }
}

/// A directory's entries with the inode numbers of its area.
pub struct Entries {
    inner: <PassthroughFs as FileSystem>::DirIter,
    area: Area,
}

impl DirectoryIterator for Entries {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let mut entry = self.inner.next()?;
        entry.ino ^= self.area.bits();
        Some(entry)
    }
}

/// The guarded file system.
pub struct GuardedFs {
    inner: PassthroughFs,
}

impl GuardedFs {
    /// Guards a passthrough file system.
    pub fn new(inner: PassthroughFs) -> Self {
        Self { inner }
    }
}

impl FileSystem for GuardedFs {
    type Inode = Node;
    type Handle = Handle;
    type DirIter = Entries;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.inner.init(capable)
    }

    fn destroy(&self) {
        self.inner.destroy();
    }

    fn lookup(&self, ctx: Context, parent: Node, name: &CStr) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        Ok(parent.adopt(name, self.inner.lookup(ctx, parent.id, name)?))
    }

    fn forget(&self, ctx: Context, node: Node, count: u64) {
        self.inner.forget(ctx, known(node).id, count);
    }

    fn batch_forget(&self, ctx: Context, mut requests: Vec<(Node, u64)>) {
        for (node, _) in &mut requests {
            *node = known(*node).id;
        }
        self.inner.batch_forget(ctx, requests);
    }

    fn getattr(
        &self,
        ctx: Context,
        node: Node,
        handle: Option<Handle>,
    ) -> io::Result<(Attr, Duration)> {
        let node = known(node);
        let (attr, _) = self.inner.getattr(ctx, node.id, handle)?;
        Ok((node.attributes(attr), node.caching().timeout))
    }

    fn setattr(
        &self,
        ctx: Context,
        node: Node,
        attr: SetattrIn,
        handle: Option<Handle>,
        valid: SetattrValid,
    ) -> io::Result<(Attr, Duration)> {
        let node = known(node);
        if valid.contains(SetattrValid::SIZE) {
            file_range(attr.size, 0)?;
        }
        let (attr, _) = self.inner.setattr(ctx, node.id, attr, handle, valid)?;
        Ok((node.attributes(attr), node.caching().timeout))
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
        Ok(parent.adopt(name, self.inner.symlink(ctx, target, parent.id, name, extensions)?))
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
        let entry = self.inner.mknod(ctx, parent.id, name, mode, rdev, umask, extensions)?;
        Ok(parent.adopt(name, entry))
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
        Ok(parent.adopt(name, self.inner.mkdir(ctx, parent.id, name, mode, umask, extensions)?))
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
        self.inner.rename(ctx, old, old_name, new, new_name, flags)
    }

    fn link(&self, ctx: Context, node: Node, parent: Node, name: &CStr) -> io::Result<Entry> {
        entry_name(name)?;
        let parent = known(parent);
        Ok(parent.adopt(name, self.inner.link(ctx, known(node).id, parent.id, name)?))
    }

    fn open(
        &self,
        ctx: Context,
        node: Node,
        kill_priv: bool,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        let node = known(node);
        let flags = open_flags(flags, OPEN_FLAGS);
        let (handle, options) = self.inner.open(ctx, node.id, kill_priv, flags)?;
        Ok((handle, node.open_options(options)))
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
        let (entry, handle, options) =
            self.inner.create(ctx, parent.id, name, mode, kill_priv, flags, umask, extensions)?;
        let entry = parent.adopt(name, entry);
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
        self.inner.read(ctx, known(node).id, handle, writer, size, offset, lock_owner, flags)
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
        let node = known(node).id;
        self.inner
            .write(ctx, node, handle, reader, size, offset, lock_owner, delayed, kill_priv, flags)
    }

    fn flush(&self, ctx: Context, node: Node, handle: Handle, lock_owner: u64) -> io::Result<()> {
        self.inner.flush(ctx, known(node).id, handle, lock_owner)
    }

    fn fsync(&self, ctx: Context, node: Node, datasync: bool, handle: Handle) -> io::Result<()> {
        self.inner.fsync(ctx, known(node).id, datasync, handle)
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
        self.inner.fallocate(ctx, known(node).id, handle, mode, offset, length)
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
        let node = known(node).id;
        self.inner.release(ctx, node, flags, handle, flush, flock_release, lock_owner)
    }

    fn statfs(&self, ctx: Context, node: Node) -> io::Result<libc::statvfs64> {
        self.inner.statfs(ctx, known(node).id)
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
        self.inner.setxattr(ctx, known(node).id, name, value, flags, extra_flags)
    }

    fn getxattr(
        &self,
        ctx: Context,
        node: Node,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.inner.getxattr(ctx, known(node).id, name, size)
    }

    fn listxattr(&self, ctx: Context, node: Node, size: u32) -> io::Result<ListxattrReply> {
        self.inner.listxattr(ctx, known(node).id, size)
    }

    fn removexattr(&self, ctx: Context, node: Node, name: &CStr) -> io::Result<()> {
        self.inner.removexattr(ctx, known(node).id, name)
    }

    fn opendir(
        &self,
        ctx: Context,
        node: Node,
        flags: u32,
    ) -> io::Result<(Option<Handle>, OpenOptions)> {
        self.inner.opendir(ctx, known(node).id, open_flags(flags, OPEN_FLAGS))
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
        self.inner.releasedir(ctx, known(node).id, flags, handle)
    }

    fn access(&self, ctx: Context, node: Node, mask: u32) -> io::Result<()> {
        self.inner.access(ctx, known(node).id, mask)
    }

    fn lseek(
        &self,
        ctx: Context,
        node: Node,
        handle: Handle,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.inner.lseek(ctx, known(node).id, handle, offset, whence)
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
        self.inner.copyfilerange(
            ctx,
            known(source).id,
            source_handle,
            source_offset,
            known(target).id,
            target_handle,
            target_offset,
            length,
            flags,
        )
    }

    fn syncfs(&self, ctx: Context, node: Node) -> io::Result<()> {
        self.inner.syncfs(ctx, known(node).id)
    }
}
