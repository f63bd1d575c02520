//! `--pidfd-socket`: whoever listens there gets a descriptor of the process that stands for a
//! container or an exec (pidfd_open(2)). Its number may be another's by the time it is looked at; a
//! descriptor stays its own.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::Context;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

/// A connection to whoever listens.
#[derive(Debug)]
pub struct PidfdSocket {
    stream: UnixStream,
    words: &'static str,
}

impl PidfdSocket {
    /// For the process of a container.
    ///
    /// # Errors
    /// Nobody listens at `path`.
    pub fn for_container(path: &Path) -> anyhow::Result<Self> {
        Self::connect(path, "standard")
    }

    /// For the process of an exec.
    ///
    /// # Errors
    /// Nobody listens at `path`.
    pub fn for_exec(path: &Path) -> anyhow::Result<Self> {
        Self::connect(path, "setns")
    }

    /// `words` are runc's, by the kind of process.
    fn connect(path: &Path, words: &'static str) -> anyhow::Result<Self> {
        let stream = UnixStream::connect(path);
        let stream = stream.with_context(|| format!("--pidfd-socket {}", path.display()))?;
        Ok(Self { stream, words })
    }

    /// Sends the descriptor, with the words as its message.
    ///
    /// # Errors
    /// The listener is gone.
    pub fn send(&self, pidfd: BorrowedFd<'_>) -> io::Result<()> {
        let words = [IoSlice::new(self.words.as_bytes())];
        let numbers = [pidfd.as_raw_fd()];
        let rights = [ControlMessage::ScmRights(&numbers)];
        let socket = self.stream.as_raw_fd();
        sendmsg::<()>(socket, &words, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
        Ok(())
    }
}
