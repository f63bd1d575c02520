//! The file behind a disk. Every method takes ranges that were checked against the capacity.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt};

use rustix::fs::{FallocateFlags, OFlags, fallocate};
use rustix::io::Errno;

use super::config::SECTOR;
use crate::virtio::buffers::Bytes;

/// How many zeroes are written at a time where the file can't make them itself.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// Why a file can't be a disk.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is a directory, a pipe, a socket or a character device.
    #[error("a disk must be a regular file or a block device")]
    Kind,
    /// It is to be written to, but was opened for reading only (or the other way round).
    #[error("the disk's file is not open for what its configuration says (read_only: {read_only})")]
    Access {
        /// What the configuration says.
        read_only: bool,
    },
    /// The host can't tell what it is or how large.
    #[error("can't find out the size of the disk's file")]
    Size(#[source] io::Error),
    /// No timer, of which a limit needs one.
    #[error("can't make a timer for the disk's limits")]
    Timer(#[source] io::Error),
}

/// A raw image.
#[derive(Debug)]
pub(super) struct Disk {
    file: File,
    sectors: u64,
}

impl Disk {
    pub(super) fn new(mut file: File, read_only: bool) -> Result<Self, OpenError> {
        let metadata = file.metadata().map_err(OpenError::Size)?;
        let kind = metadata.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(OpenError::Kind);
        }
        let flags =
            rustix::fs::fcntl_getfl(&file).map_err(|error| OpenError::Size(error.into()))?;
        let access = flags & OFlags::RWMODE;
        if access == OFlags::WRONLY || (!read_only && access == OFlags::RDONLY) {
            return Err(OpenError::Access { read_only });
        }
        let size = file.seek(SeekFrom::End(0)).map_err(OpenError::Size)?;
        Ok(Self { file, sectors: size / SECTOR })
    }

    /// The capacity.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    pub(super) fn read(&self, offset: u64, data: Bytes<'_>) -> io::Result<()> {
        data.read_all_at(self.file.as_fd(), offset)
    }

    pub(super) fn write(&self, offset: u64, data: Bytes<'_>) -> io::Result<()> {
        data.write_all_at(self.file.as_fd(), offset)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives space back. Where the file can't, nothing happens: a discard is a hint.
    pub(super) fn discard(&self, offset: u64, length: u64) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, punch, offset, length) {
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NODEV) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a range read as zeroes; only where `may_unmap` may its space be given back.
    pub(super) fn write_zeroes(&self, offset: u64, length: u64, may_unmap: bool) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let ways: &[_] = if may_unmap { &[punch, zero] } else { &[zero] };
        for way in ways {
            match fallocate(&self.file, *way, offset, length) {
                Err(Errno::OPNOTSUPP | Errno::NODEV) => {}
                done => return Ok(done?),
            }
        }
        let mut done = 0;
        while done < length {
            let count = (length - done).min(ZEROES.len() as u64);
            self.file.write_all_at(&ZEROES[..count as usize], offset + done)?;
            done += count;
        }
        Ok(())
    }
}
