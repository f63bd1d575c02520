//! What can be done with a nameless file, over its descriptor.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FallocateFlags, Gid, Mode, OFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags,
    fallocate, fchmod, fchown, fdatasync, fgetxattr, flistxattr, fremovexattr, fsetxattr, fstat,
    fsync, ftruncate, futimens, linkat, openat, seek,
};
use virtiofsd::filesystem::{
    Context, GetxattrReply, ListxattrReply, SetattrValid, SetxattrFlags, ZeroCopyReader,
    ZeroCopyWriter,
};
use virtiofsd::fuse::{Attr, SetattrIn};
use virtiofsd::oslib::{ScopedUmask, WritevFlags};
use virtiofsd::passthrough::credentials::{UnixCredentials, drop_effective_cap};
use virtiofsd::soft_idmap::{GuestGid, GuestUid, HostGid, HostUid, Id};

use crate::virtio::fs::guarded::area::{Area, Known};
use crate::virtio::fs::guarded::checks::errno;

/// A descriptor of a nameless file.
pub struct NamelessFile {
    pub(super) file: Arc<File>,
    pub(super) area: Area,
}

/// What a nameless file is made with.
#[derive(Debug, Clone, Copy)]
pub struct Making {
    /// The access mode, `O_EXCL` for one that never gets a name, and the like.
    pub flags: u32,
    /// Its mode, before mask and default ACL.
    pub mode: u32,
    /// The mask for where there is no default ACL.
    pub umask: u32,
}

/// Makes a nameless file in a directory for the user that asks for it.
///
/// # Errors
/// As `open(2)`.
pub fn make(directory: &File, context: &Context, making: Making) -> io::Result<File> {
    let user = HostUid::from(context.uid.into_inner());
    let group = HostGid::from(context.gid.into_inner());
    let _credentials = UnixCredentials::new(user, group).supplementary_gid(true, vec![]).set()?;
    let _mask = ScopedUmask::new(making.umask);
    let flags = OFlags::from_bits_retain(making.flags) | OFlags::TMPFILE | OFlags::CLOEXEC;
    let mode = Mode::from_raw_mode(making.mode & 0o7777);
    Ok(openat(directory, c".", flags, mode)?.into())
}

impl NamelessFile {
    fn known(&self) -> Known {
        Known { id: 0, area: self.area }
    }

    /// How long the guest may believe this file's attributes.
    pub fn timeout(&self) -> std::time::Duration {
        self.known().timeout()
    }

    /// Opens it once more.
    pub fn reopen(&self, fd_directory: &File, flags: u32) -> io::Result<File> {
        let flags = OFlags::from_bits_retain(flags) & !OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = self.file.as_raw_fd().to_string();
        Ok(openat(fd_directory, name.as_str(), flags, Mode::empty())?.into())
    }

    /// Gives it a name.
    pub fn link(&self, fd_directory: &File, directory: &File, name: &CStr) -> io::Result<()> {
        let own = self.file.as_raw_fd().to_string();
        Ok(linkat(fd_directory, own.as_str(), directory, name, AtFlags::SYMLINK_FOLLOW)?)
    }

    /// Whether these are the attributes of this file.
    pub fn is(&self, attributes: &Attr) -> io::Result<bool> {
        Ok(fstat(&self.file)?.st_ino == attributes.ino)
    }

    /// Its attributes as the guest sees them.
    pub fn attributes(&self) -> io::Result<Attr> {
        let status = fstat(&self.file)?;
        let attributes = Attr {
            ino: status.st_ino,
            size: status.st_size.cast_unsigned(),
            blocks: status.st_blocks.cast_unsigned(),
            atime: status.st_atime.cast_unsigned(),
            mtime: status.st_mtime.cast_unsigned(),
            ctime: status.st_ctime.cast_unsigned(),
            atimensec: status.st_atime_nsec as u32,
            mtimensec: status.st_mtime_nsec as u32,
            ctimensec: status.st_ctime_nsec as u32,
            mode: status.st_mode,
            nlink: status.st_nlink as u32,
            uid: GuestUid::from(status.st_uid),
            gid: GuestGid::from(status.st_gid),
            rdev: 0,
            blksize: status.st_blksize as u32,
            flags: 0,
        };
        Ok(self.known().attributes(attributes))
    }

    /// Sets attributes.
    pub fn set_attributes(&self, attr: &SetattrIn, valid: SetattrValid) -> io::Result<()> {
        if valid.contains(SetattrValid::MODE) {
            fchmod(&self.file, Mode::from_raw_mode(attr.mode & 0o7777))?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let user = valid.contains(SetattrValid::UID).then(|| attr.uid.into_inner());
            let group = valid.contains(SetattrValid::GID).then(|| attr.gid.into_inner());
            // The largest number means "as it is" to the kernel and can't be an owner.
            if user == Some(u32::MAX) || group == Some(u32::MAX) {
                return Err(errno(libc::EINVAL));
            }
            fchown(&self.file, user.map(Uid::from_raw), group.map(Gid::from_raw))?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _kept = without_set_id(valid.contains(SetattrValid::KILL_SUIDGID))?;
            ftruncate(&self.file, attr.size)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            futimens(&self.file, &times(attr, valid))?;
        }
        Ok(())
    }

    /// Reads into the guest's memory.
    pub fn read(&self, mut to: impl ZeroCopyWriter, size: u32, offset: u64) -> io::Result<usize> {
        to.read_from_file_at(&self.file, size as usize, offset, None)
    }

    /// Writes from the guest's memory.
    pub fn write(
        &self,
        mut from: impl ZeroCopyReader,
        size: u32,
        offset: u64,
        kill_set_id: bool,
        append: bool,
    ) -> io::Result<usize> {
        let _kept = without_set_id(kill_set_id)?;
        let flags = append.then_some(WritevFlags::RWF_APPEND);
        from.write_to_file_at(&self.file, size as usize, offset, flags)
    }

    /// Makes its contents durable.
    pub fn sync(&self, data_only: bool) -> io::Result<()> {
        Ok(if data_only { fdatasync(&self.file) } else { fsync(&self.file) }?)
    }

    /// Allocates or punches holes.
    pub fn allocate(&self, mode: u32, offset: u64, length: u64) -> io::Result<()> {
        Ok(fallocate(&self.file, FallocateFlags::from_bits_retain(mode), offset, length)?)
    }

    /// Finds data or holes.
    pub fn seek(&self, offset: u64, whence: u32) -> io::Result<u64> {
        let to = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(errno(libc::EINVAL)),
        };
        Ok(seek(&self.file, to)?)
    }

    /// An extended attribute, or its length for a size of 0.
    pub fn attribute(&self, name: &CStr, size: u32) -> io::Result<GetxattrReply> {
        let mut value = vec![0; size as usize];
        let length = fgetxattr(&self.file, name, &mut value)?;
        if size == 0 {
            return Ok(GetxattrReply::Count(length as u32));
        }
        value.truncate(length);
        Ok(GetxattrReply::Value(value))
    }

    /// The names of its extended attributes, or their length for a size of 0.
    pub fn attribute_names(&self, size: u32) -> io::Result<ListxattrReply> {
        let mut names = vec![0; size as usize];
        let length = flistxattr(&self.file, &mut names)?;
        if size == 0 {
            return Ok(ListxattrReply::Count(length as u32));
        }
        names.truncate(length);
        Ok(ListxattrReply::Names(names))
    }

    /// Sets an extended attribute.
    pub fn set_attribute(
        &self,
        name: &CStr,
        value: &[u8],
        flags: u32,
        extra: SetxattrFlags,
    ) -> io::Result<()> {
        if extra.contains(SetxattrFlags::SETXATTR_ACL_KILL_SGID) {
            let mode = fstat(&self.file)?.st_mode & 0o7777 & !libc::S_ISGID;
            fchmod(&self.file, Mode::from_raw_mode(mode))?;
        }
        Ok(fsetxattr(&self.file, name, value, XattrFlags::from_bits_retain(flags))?)
    }

    /// Removes an extended attribute.
    pub fn remove_attribute(&self, name: &CStr) -> io::Result<()> {
        Ok(fremovexattr(&self.file, name)?)
    }

    /// The file system that it is in.
    pub fn file_system(&self) -> io::Result<libc::statvfs64> {
        let mut status = std::mem::MaybeUninit::zeroed();
        // SAFETY: `status` has room for what is written to it.
        let result = unsafe { libc::fstatvfs64(self.file.as_raw_fd(), status.as_mut_ptr()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the structure consists of integers, which zeroes initialise.
        Ok(unsafe { status.assume_init() })
    }
}

/// Gives up the calling thread's privilege to leave set-id bits on what it writes, if `kill`, until
/// the returned guard is dropped.
fn without_set_id(kill: bool) -> io::Result<Option<impl Drop>> {
    if kill { drop_effective_cap("FSETID") } else { Ok(None) }
}

fn times(attr: &SetattrIn, valid: SetattrValid) -> Timestamps {
    let time = |set, now, seconds: u64, nanoseconds: u32| {
        let special = |nanoseconds| Timespec { tv_sec: 0, tv_nsec: nanoseconds };
        if valid.contains(now) {
            special(libc::UTIME_NOW)
        } else if valid.contains(set) {
            Timespec { tv_sec: seconds.cast_signed(), tv_nsec: nanoseconds.into() }
        } else {
            special(libc::UTIME_OMIT)
        }
    };
    use SetattrValid as Valid;
    Timestamps {
        last_access: time(Valid::ATIME, Valid::ATIME_NOW, attr.atime, attr.atimensec),
        last_modification: time(Valid::MTIME, Valid::MTIME_NOW, attr.mtime, attr.mtimensec),
    }
}
