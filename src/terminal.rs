//! The caller's terminal: its size, and raw mode for as long as something else is its line
//! discipline.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use kiln_protocol::WindowSize;
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

nix::ioctl_read_bad!(get_window_size, libc::TIOCGWINSZ, libc::winsize);

/// The size of a terminal, or `None` if the descriptor isn't one.
pub fn size(terminal: BorrowedFd<'_>) -> Option<WindowSize> {
    use std::os::fd::AsRawFd;

    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: the kernel writes one winsize, which `size` is.
    unsafe { get_window_size(terminal.as_raw_fd(), &raw mut size) }.ok()?;
    Some(WindowSize { rows: size.ws_row, columns: size.ws_col })
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
