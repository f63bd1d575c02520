//! The caller's terminal: its size, and raw mode for as long as something else is its line
//! discipline.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::Path;

use kiln_protocol::WindowSize;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::pty::openpty;
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);

/// The size of a terminal, or `None` if the descriptor isn't one.
pub fn size(terminal: BorrowedFd<'_>) -> Option<WindowSize> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one winsize, which `size` is.
    unsafe { get_window_size(terminal.as_raw_fd(), &raw mut size) }.ok()?;
    Some(WindowSize { rows: size.ws_row, columns: size.ws_col })
}

/// Makes a pseudo-terminal: its master, and its slave in raw mode, for the line discipline is the
/// guest's.
///
/// # Errors
/// No terminals or descriptors are left.
pub fn open_pair(size: WindowSize) -> io::Result<(OwnedFd, OwnedFd)> {
    let size =
        libc::winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    let pair = openpty(Some(&size), None)?;
    let mut raw = tcgetattr(&pair.slave)?;
    cfmakeraw(&mut raw);
    tcsetattr(&pair.slave, SetArg::TCSANOW, &raw)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    Ok((pair.master, pair.slave))
}

/// Sends the master of a terminal over the Unix socket at `path`, as runc's `--console-socket` does:
/// one byte-string message, the slave's name, that the descriptor comes with.
///
/// # Errors
/// Nobody listens there.
pub fn send_master(path: &Path, master: OwnedFd, slave: BorrowedFd<'_>) -> io::Result<()> {
    let socket = UnixStream::connect(path)?;
    let name = nix::unistd::ttyname(slave)?;
    let name = [IoSlice::new(name.as_os_str().as_bytes())];
    let numbers = [master.as_raw_fd()];
    let rights = [ControlMessage::ScmRights(&numbers)];
    sendmsg::<()>(socket.as_raw_fd(), &name, &rights, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

/// Raw mode of standard input; dropping it restores what was before.
#[derive(Debug)]
pub struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches the terminal on standard input to raw mode.
    ///
    /// # Errors
    /// Standard input is no terminal.
    pub fn enter() -> io::Result<Self> {
        let stdin = io::stdin();
        let before = tcgetattr(stdin.as_fd())?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(stdin.as_fd(), SetArg::TCSANOW, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // TCSADRAIN: what the guest wrote last is shown as it was meant. Fails only if the terminal
        // is gone.
        let _ = tcsetattr(io::stdin().as_fd(), SetArg::TCSADRAIN, &self.before);
    }
}
