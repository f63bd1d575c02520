//! Waits for a machine's process, and for reasons to end it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// Why a machine was ended from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupted {
    /// The user typed the escape sequence.
    Keyboard,
    /// The command got this signal.
    Signal(i32),
}

/// What comes first.
#[derive(Debug, PartialEq, Eq)]
pub enum First {
    /// The descriptor became readable.
    Readable,
    /// A reason to end the machine.
    Interrupted(Interrupted),
}

/// The signals that end a machine.
#[derive(Debug)]
pub struct Signals(SignalFd);

impl Signals {
    /// Takes them in from now on.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn block() -> io::Result<Self> {
        let set: SigSet = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTERM]
            .into_iter()
            .collect();
        set.thread_block()?;
        Ok(Self(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?))
    }

    /// Readable once there was one.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    /// Which one there was.
    ///
    /// # Errors
    /// There was none.
    pub fn taken(&self) -> io::Result<Interrupted> {
        let info = self.0.read_signal()?.ok_or(io::ErrorKind::WouldBlock)?;
        Ok(Interrupted::Signal(i32::try_from(info.ssi_signo).unwrap_or_default()))
    }

    /// Waits until `process` is readable, or the machine is to be ended: by a signal, or because
    /// `keyboard` says so.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn wait(
        &self,
        process: BorrowedFd<'_>,
        keyboard: Option<BorrowedFd<'_>>,
    ) -> io::Result<First> {
        let mut polled = vec![
            PollFd::new(process, PollFlags::POLLIN),
            PollFd::new(self.0.as_fd(), PollFlags::POLLIN),
        ];
        polled.extend(keyboard.map(|fd| PollFd::new(fd, PollFlags::POLLIN)));
        loop {
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let ready: Vec<bool> = polled.iter().map(|fd| fd.any() == Some(true)).collect();
            if ready[0] {
                return Ok(First::Readable);
            }
            if ready[1] {
                return Ok(First::Interrupted(self.taken()?));
            }
            if ready.get(2) == Some(&true) {
                return Ok(First::Interrupted(Interrupted::Keyboard));
            }
        }
    }
}
