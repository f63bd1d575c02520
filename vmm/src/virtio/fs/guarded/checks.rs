//! Checks on what a guest names.

use std::ffi::CStr;
use std::io;

/// Flags that an open of a file or directory may carry.
pub const OPEN_FLAGS: i32 = libc::O_ACCMODE
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

/// An error of the system with this number.
pub fn errno(code: i32) -> io::Error {
    io::Error::from_raw_os_error(code)
}

/// Checks that a name is that of an entry in a directory.
pub fn entry_name(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(errno(libc::EINVAL)),
        bytes if bytes.contains(&b'/') => Err(errno(libc::EINVAL)),
        _ => Ok(()),
    }
}

/// Checks that a range lies in what a file can hold.
pub fn file_range(offset: u64, length: u64) -> io::Result<()> {
    let end = offset.checked_add(length).filter(|end| i64::try_from(*end).is_ok());
    end.map(|_| ()).ok_or_else(|| errno(libc::EINVAL))
}

/// Leaves the flags that are allowed.
pub fn open_flags(flags: u32, allowed: i32) -> u32 {
    flags & allowed.cast_unsigned()
}
