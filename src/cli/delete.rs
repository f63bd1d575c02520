//! `kiln delete`: remove what is left of a container.

use std::os::fd::{AsFd, AsRawFd};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::Global;
use crate::hooks;
use crate::readiness::readable_by;
use crate::state::{self, Monitor, StateDir, StateError, Status};

/// How long a monitor may take to end once it has been killed: the kernel frees its memory.
const END: Duration = Duration::from_secs(10);

/// Options of `kiln delete`.
#[derive(Debug, clap::Args)]
pub struct Delete {
    /// Kill the container if it runs; that there is none is no error
    #[arg(short, long)]
    force: bool,
    /// The container's id
    id: String,
}

/// Removes the container.
pub fn run(global: &Global, delete: &Delete) -> anyhow::Result<ExitCode> {
    match delete_container(global, delete) {
        Err(error) if delete.force && is_unknown(&error) => Ok(ExitCode::SUCCESS),
        result => result.map(|()| ExitCode::SUCCESS),
    }
}

fn is_unknown(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(StateError::Unknown { .. }))
}

fn delete_container(global: &Global, delete: &Delete) -> anyhow::Result<()> {
    match state::find(&global.root, &delete.id) {
        Ok(container) => match container.status() {
            Status::Stopped => {}
            status @ (Status::Creating | Status::Running | Status::Paused) if !delete.force => {
                bail!(
                    "cannot delete container {} that is not stopped: {}",
                    delete.id,
                    status.name()
                );
            }
            _ => {
                // What is frozen can't end.
                container.record.cgroup.thaw();
                kill(container.record.monitor)?;
            }
        },
        // A command was killed before it had written anything, or somebody else wrote there: the lock
        // says whether whoever stands for it has ended.
        Err(StateError::Nameless { .. } | StateError::Damaged { .. }) if delete.force => {}
        Err(error) => return Err(error.into()),
    }
    let state = StateDir::seize(&global.root, &delete.id, END)?;
    let record = state.record();
    state.remove().context("state directory")?;
    if let Some(record) = record {
        let stopped = hooks::state_of(&record, Status::Stopped, None);
        hooks::run_all("poststop", &record.hooks.poststop, &stopped);
    }
    Ok(())
}

/// Kills a monitor, and with it everything of its sandbox, and waits for its end.
///
/// # Errors
/// It doesn't end.
pub fn kill(monitor: Monitor) -> anyhow::Result<()> {
    let Some(pidfd) = monitor.open() else { return Ok(()) };
    let number = pidfd.as_raw_fd();
    let nothing = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: an open descriptor and plain numbers; a null siginfo is allowed.
    unsafe { libc::syscall(libc::SYS_pidfd_send_signal, number, libc::SIGKILL, nothing, 0) };
    if !readable_by(pidfd.as_fd(), Some(Instant::now() + END))? {
        bail!("the sandbox's monitor (process {}) does not end", monitor.pid);
    }
    Ok(())
}
