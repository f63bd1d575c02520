//! The terminal that a container's process or an exec is to have: the caller's own, or a new one
//! whose master goes over `--console-socket`.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use anyhow::{Context, bail};
use kiln_protocol::WindowSize;
use oci_spec::runtime::Process;

use crate::process::Launch;
use crate::terminal::{self, RawMode};

/// What was asked for.
#[derive(Debug, Clone, Copy)]
pub struct Console<'a> {
    /// The process gets a terminal.
    pub wanted: bool,
    /// Where the terminal's master goes.
    pub socket: Option<&'a Path>,
    /// The command stays until the process's end.
    pub attached: bool,
}

impl Console<'_> {
    /// The terminal's first size, if there is to be one.
    ///
    /// # Errors
    /// What was asked for does not agree, or needs a terminal that the caller doesn't have.
    pub fn size(&self, process: Option<&Process>) -> anyhow::Result<Option<WindowSize>> {
        let socket = self.socket.is_some();
        if socket && (self.attached || !self.wanted) {
            bail!("cannot use console socket if kiln will not detach or allocate tty");
        }
        if !self.wanted {
            return Ok(None);
        }
        if !self.attached {
            if !socket {
                bail!("cannot allocate tty if kiln will detach without setting console socket");
            }
            return Ok(Some(configured_size(process)));
        }
        // SAFETY: standard input stays open.
        match terminal::size(unsafe { BorrowedFd::borrow_raw(0) }.as_fd()) {
            Some(size) => Ok(Some(size)),
            None => bail!(
                "process.terminal: standard input is not a terminal: set it to false, or run kiln \
                 in a terminal"
            ),
        }
    }

    /// Gives the process that stands for the guest's its session and terminal. A foreground one
    /// shares the command's, which is in raw mode as long as the result lives.
    ///
    /// # Errors
    /// The terminal can't be made, changed or sent.
    pub fn attach(
        &self,
        launch: &mut Launch,
        size: Option<WindowSize>,
    ) -> anyhow::Result<Option<RawMode>> {
        if self.attached {
            return size.map(|_| RawMode::enter()).transpose().context("terminal");
        }
        let slave = match (self.socket, size) {
            (Some(socket), Some(size)) => Some(send_terminal(socket, size)?),
            _ => None,
        };
        launch.lead_session(slave)?;
        Ok(None)
    }
}

fn configured_size(process: Option<&Process>) -> WindowSize {
    let size = process.and_then(|process| process.console_size());
    let cells = |count: u64| u16::try_from(count).unwrap_or(u16::MAX);
    size.map_or(WindowSize { rows: 0, columns: 0 }, |size| WindowSize {
        rows: cells(size.height()),
        columns: cells(size.width()),
    })
}

/// Makes a terminal and sends its master to whoever listens on `socket`; gives the slave.
fn send_terminal(socket: &Path, size: WindowSize) -> anyhow::Result<OwnedFd> {
    let (master, slave) = terminal::open_pair(size).context("terminal")?;
    terminal::send_master(socket, master, slave.as_fd())
        .with_context(|| format!("--console-socket {}", socket.display()))?;
    Ok(slave)
}
