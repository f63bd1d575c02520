//! The pseudo-terminals of a container: allocated in the container's own devpts, so that its name is
//! true inside.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use kiln_protocol::WindowSize;
use rustix::fs::OFlags;

use super::devices::{self, Node};
use super::tree;
use kiln_rooted::{self as resolve, Kind};

/// Both ends of a pseudo-terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The agent's end.
    pub master: OwnedFd,
    /// The container's end.
    pub slave: OwnedFd,
}

/// Allocates a terminal in the devpts at `/dev/pts` below `root`.
///
/// # Errors
/// `ENOENT` if no devpts is mounted there, `ENODEV` if `/dev/pts/ptmx` is something else.
pub fn allocate(root: BorrowedFd<'_>, size: WindowSize) -> io::Result<Terminal> {
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let ptmx = Node::Character(5, 2);
    let master = devices::open_checked(root, Path::new("/dev/pts/ptmx"), ptmx, flags)?;
    let unlocked: libc::c_int = 0;
    // SAFETY: the ioctl reads an int, which lives for the call.
    if unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCSPTLCK, &raw const unlocked) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: the ioctl takes flags and no pointer.
    let slave = unsafe { libc::ioctl(master.as_raw_fd(), libc::TIOCGPTPEER, flags) };
    if slave < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the ioctl gave a new descriptor that nothing else owns.
    let slave = unsafe { OwnedFd::from_raw_fd(slave) };
    resize(master.as_fd(), size)?;
    Ok(Terminal { master, slave })
}

/// Mounts a terminal's slave at `/dev/console` below `root`.
///
/// # Errors
/// As openat2(2) and move_mount(2).
pub fn make_console(root: BorrowedFd<'_>, terminal: &Terminal) -> io::Result<()> {
    let console = resolve::ensure(root, Path::new("/dev/console"), Kind::File)?;
    tree::attach(tree::copy(terminal.slave.as_fd(), false)?.as_fd(), console.as_fd())
}

/// Sets a terminal's size; its foreground process group gets SIGWINCH.
///
/// # Errors
/// `ENOTTY` if it is no terminal.
pub fn resize(master: BorrowedFd<'_>, size: WindowSize) -> io::Result<()> {
    let size = rustix::termios::Winsize {
        ws_row: size.rows,
        ws_col: size.columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    Ok(rustix::termios::tcsetwinsize(master, size)?)
}
