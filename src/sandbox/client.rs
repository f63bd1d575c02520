//! The command's side of a sandbox, or of an exec: it starts the process that stands for it, passes
//! signals and the size of its terminal on, and waits for the outcome.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitStatus;

use anyhow::{Context, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::MsgFlags;

use super::events::watched_signals;
use super::pidfd_socket::PidfdSocket;
use super::{FromCommand, FromMonitor, Occasion, Outcome, packet};
use crate::process::{Launch, Process, describe};
use crate::terminal;

/// Runs the hooks of an occasion; the number is the monitor's process id.
type Hooks = Box<dyn Fn(Occasion, u32) -> anyhow::Result<()>>;

/// How the wait for a process that stands for one in a guest ended.
#[derive(Debug)]
pub enum Ending {
    /// It goes on by itself.
    Released,
    /// It has ended, and says how that came.
    Outcome(Outcome),
    /// It was ended.
    Died(ExitStatus),
}

/// A process that stands for one in a guest, and is being started.
pub struct Client {
    signals: SignalFd,
    socket: OwnedFd,
    hooks: Hooks,
    pidfd_socket: Option<PidfdSocket>,
}

impl Client {
    /// Begins to take in signals. The second value is the process's end of the socket.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn new() -> io::Result<(Self, OwnedFd)> {
        let signals = watched_signals(true);
        signals.thread_block()?;
        let signals =
            SignalFd::with_flags(&signals, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)?;
        let (socket, theirs) = packet::pair()?;
        let hooks = Box::new(|_, _| Ok(()));
        Ok((Self { signals, socket, hooks, pidfd_socket: None }, theirs))
    }

    /// Has hooks run. If they fail, the monitor is killed.
    pub fn run_hooks(&mut self, hooks: impl Fn(Occasion, u32) -> anyhow::Result<()> + 'static) {
        self.hooks = Box::new(hooks);
    }

    /// Has a descriptor of the process sent as soon as there is one.
    pub fn send_pidfd(&mut self, socket: Option<PidfdSocket>) {
        self.pidfd_socket = socket;
    }

    /// Starts a monitor and waits for what its [`Mode`](super::Mode) says: for its end, which has
    /// an outcome, or until it goes on by itself.
    ///
    /// # Errors
    /// The monitor can't be started, or ended without an outcome, or a hook failed.
    pub fn supervise(self, launch: Launch) -> anyhow::Result<Option<Outcome>> {
        match self.stand_by(launch)? {
            Ending::Released => Ok(None),
            Ending::Outcome(outcome) => Ok(Some(outcome)),
            Ending::Died(status) => {
                bail!(
                    "the sandbox's monitor {} without an outcome: if nobody killed it, the host's \
                     kernel did for want of memory (see dmesg)",
                    describe(status)
                )
            }
        }
    }

    /// Starts the process and waits for its end, or until it goes on by itself.
    ///
    /// # Errors
    /// It can't be started, or a hook failed.
    pub fn stand_by(self, launch: Launch) -> anyhow::Result<Ending> {
        // The terminal's signals reach the whole process group; the process looks at who sent them.
        let blocked = watched_signals(true);
        let mut process = launch
            .spawn_with(move || Ok(blocked.thread_block()?))
            .context("cannot start the process that stands for it")?;
        if let Some(socket) = &self.pidfd_socket {
            socket.send(process.pidfd()).context("--pidfd-socket")?;
        }
        loop {
            match self.wait(&mut process)? {
                Some(FromMonitor::At(occasion)) => {
                    (self.hooks)(occasion, process.id())?;
                    // A process that has ended shows by its pidfd.
                    let _ = packet::send_message(self.socket.as_fd(), &FromCommand::Proceed);
                }
                Some(FromMonitor::Reached) => {
                    process.release();
                    return Ok(Ending::Released);
                }
                Some(FromMonitor::Ended(outcome)) => {
                    process.wait()?;
                    return Ok(Ending::Outcome(outcome));
                }
                None => return Ok(Ending::Died(process.wait()?)),
            }
        }
    }

    fn wait(&self, process: &mut Process) -> anyhow::Result<Option<FromMonitor>> {
        loop {
            let mut polled = [
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.socket.as_fd(), PollFlags::POLLIN),
                PollFd::new(process.pidfd(), PollFlags::POLLIN),
            ];
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::Error::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
            let [signals, socket, ended] = polled.map(|p| p.any() == Some(true));
            if signals {
                self.pass_signals_on()?;
            }
            if socket {
                return packet::receive(self.socket.as_fd(), MsgFlags::empty())
                    .context("its message");
            }
            if ended {
                return Ok(None);
            }
        }
    }

    fn pass_signals_on(&self) -> io::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            let number = i32::try_from(info.ssi_signo).unwrap_or_default();
            let message = if number == libc::SIGWINCH {
                // SAFETY: standard input stays open.
                match terminal::size(unsafe { BorrowedFd::borrow_raw(0) }) {
                    Some(size) => FromCommand::Resize(size),
                    None => continue,
                }
            } else {
                FromCommand::Signal(number)
            };
            // A process that has ended shows by its pidfd.
            let _ = packet::send_message(self.socket.as_fd(), &message);
        }
        Ok(())
    }
}
