//! Waiting for one descriptor, for as long as there is time.

use std::io;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// Waits until a descriptor is readable or closed; `false` at the deadline. Without one it waits for
/// ever.
///
/// # Errors
/// As poll(2), but for signals.
pub fn readable_by(fd: BorrowedFd<'_>, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = match left {
            None => PollTimeout::NONE,
            Some(Duration::ZERO) => PollTimeout::ZERO,
            // Rounded up, so as not to poll without rest at the end.
            Some(left) => PollTimeout::try_from(left.saturating_add(Duration::from_millis(1)))
                .unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if left == Some(Duration::ZERO) => return Ok(false),
            Ok(0) | Err(nix::Error::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;

    #[test]
    fn what_is_there_is_found_and_what_never_comes_is_waited_for_until_the_deadline() {
        let (reader, writer) = io::pipe().expect("pipe");
        let deadline = Instant::now() + Duration::from_millis(20);
        assert!(!readable_by(reader.as_fd(), Some(deadline)).expect("polls"));
        assert!(Instant::now() >= deadline);
        drop(writer);
        assert!(readable_by(reader.as_fd(), Some(deadline)).expect("polls"));
        assert!(readable_by(reader.as_fd(), None).expect("polls"));
    }
}
