//! A jailed process never outlives the one that started it.

use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::error::{During, JailError};

/// Has the kernel kill this process when the thread that started it ends.
///
/// The kernel forgets the request whenever the process's identity or capabilities change, so this
/// comes after such changes. `control` is a socket whose other end the starter holds: if that has
/// been closed by now the starter ended too early for the kernel to notice, and so does this.
/// (`getppid` can't tell: in a pid namespace of its own a process has parent 0 all its life.)
///
/// # Errors
/// [`JailError::ParentGone`], or the kernel refuses.
pub fn die_with_it(control: Option<BorrowedFd<'_>>) -> Result<(), JailError> {
    capctl::prctl::set_pdeathsig(Some(libc::SIGKILL))
        .map_err(|error| std::io::Error::from_raw_os_error(error.code()))
        .during("ask to be killed with the parent")?;
    let Some(control) = control else {
        return Ok(());
    };
    let mut polled = [PollFd::from_borrowed_fd(control, PollFlags::RDHUP)];
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&at_once)).during("look at the control socket")?;
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    if polled[0].revents().intersects(gone) {
        return Err(JailError::ParentGone);
    }
    Ok(())
}
