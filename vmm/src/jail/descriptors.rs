//! Closes every file descriptor that a jail doesn't list, and proves it.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, RawFd};

use super::error::{During, JailError, checked};

/// Closes every descriptor except `kept` and standard input, output and error; of those three, the
/// ones not listed are replaced with `/dev/null`, so that nothing opened later takes their number.
///
/// The result is compared with what `/proc/self/fd` shows.
///
/// Descriptors that anything in the process still owns must be listed: closing them here takes
/// them away from their owner.
///
/// # Errors
/// A listed descriptor isn't open, or `/dev/null` or `/proc/self/fd` can't be opened.
pub fn keep_only(kept: &[RawFd]) -> Result<(), JailError> {
    let mut kept = kept.to_vec();
    kept.sort_unstable();
    kept.dedup();
    if let Some(&missing) = kept.iter().find(|&&fd| !is_open(fd)) {
        return Err(JailError::NotOpen(missing));
    }
    null_unlisted_standard_streams(&kept)?;
    kept.extend([0, 1, 2].iter().filter(|fd| !kept.contains(fd)).copied().collect::<Vec<_>>());
    kept.sort_unstable();
    for (first, last) in gaps(&kept) {
        close_range(first, last).during("close the file descriptors that the jail doesn't list")?;
    }
    verify(&kept)
}

/// The ranges of numbers, ends included, between and above `kept`, which is sorted.
fn gaps(kept: &[RawFd]) -> Vec<(u32, u32)> {
    let mut gaps = Vec::with_capacity(kept.len() + 1);
    let mut next = 0u32;
    for fd in kept.iter().filter_map(|&fd| u32::try_from(fd).ok()) {
        if fd > next {
            gaps.push((next, fd - 1));
        }
        next = fd + 1;
    }
    gaps.push((next, u32::MAX));
    gaps
}

fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the call takes plain numbers; who owns the descriptors is this module's contract.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) }).map(|_| ())
}

fn is_open(fd: RawFd) -> bool {
    // SAFETY: F_GETFD only reads the descriptor table.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

fn null_unlisted_standard_streams(kept: &[RawFd]) -> Result<(), JailError> {
    let missing: Vec<RawFd> = (0..=2).filter(|fd| !kept.contains(fd)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let null = fs::File::options().read(true).write(true).open("/dev/null");
    let null = null.during("open /dev/null")?;
    for fd in missing {
        // SAFETY: both are numbers; standard streams have no owner.
        checked(unsafe { libc::dup2(null.as_raw_fd(), fd) }.into())
            .during("put /dev/null in place of a standard stream")?;
    }
    if null.as_raw_fd() <= 2 {
        std::mem::forget(null);
    }
    Ok(())
}

fn verify(kept: &[RawFd]) -> Result<(), JailError> {
    if counted()? == Some(kept.len()) {
        return Ok(());
    }
    const STEP: &str = "list /proc/self/fd";
    // The listing's own descriptor is the only other one, and closed by the time its name is read.
    let open: Vec<RawFd> = fs::read_dir("/proc/self/fd")
        .during(STEP)?
        .map(|entry| Ok(entry.during(STEP)?.file_name().to_string_lossy().parse().ok()))
        .filter_map(Result::transpose)
        .collect::<Result<_, JailError>>()?;
    for fd in open.into_iter().filter(|fd| !kept.contains(fd)) {
        match fs::read_link(format!("/proc/self/fd/{fd}")) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            target => {
                let target = target.unwrap_or_default().to_string_lossy().into_owned();
                return Err(JailError::Unlisted { fd, target });
            }
        }
    }
    Ok(())
}

/// How many descriptors are open, which kernels from 6.2 on give as the size of `/proc/self/fd`
/// (Documentation/filesystems/proc.rst); all of `kept` are, so that as many are those. To list them
/// makes an inode for each.
fn counted() -> Result<Option<usize>, JailError> {
    let size = fs::metadata("/proc/self/fd").during("look at /proc/self/fd")?.len();
    Ok(usize::try_from(size).ok().filter(|&count| count > 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_what_lies_between() {
        assert_eq!(gaps(&[0, 1, 2]), [(3, u32::MAX)]);
        assert_eq!(gaps(&[0, 2, 5]), [(1, 1), (3, 4), (6, u32::MAX)]);
    }

    #[test]
    fn a_listed_descriptor_must_be_open() {
        assert!(matches!(keep_only(&[1_000_000]), Err(JailError::NotOpen(1_000_000))));
    }
}
