//! Processes that the kernel is to kill for want of memory.
//!
//! `kiln oom-victim` starts a process, the owner, and that one another, the victim, which shares its
//! memory. The victim goes to the cgroup without memory and asks the kernel for what is accounted for where
//! a process is, not where its memory is: pipes. The kernel kills it, and the owner with it.

use std::ffi::{c_int, c_void};
use std::os::fd::OwnedFd;
use std::ptr;

use anyhow::{Context, ensure};
use kiln_vmm::config::InheritedFd;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, wait};
use nix::unistd::{ForkResult, alarm, fork, pause};
use serde::{Deserialize, Serialize};

use crate::place::{oom, restraint};

/// The victim is the first to be killed, whatever the container's score is.
const FIRST: i32 = 1000;
/// How many pipes are filled, at most.
const PIPES: usize = 64;
/// What is written into each at once, in bytes.
const PORTION: [u8; 4096] = [0; 4096];
/// The victim's stack, in bytes.
const STACK: usize = 64 << 10;
/// How long the owner waits for its end, in seconds.
const PATIENCE: u32 = 4;

/// Configuration of `kiln oom-victim`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VictimConfig {
    /// `cgroup.procs` of the cgroup without memory, for writing.
    pub processes: InheritedFd,
}

/// `kiln oom-victim`: has two processes killed. This one has one thread.
///
/// # Errors
/// They ended otherwise, or could not be started.
///
/// # Safety
/// As for [`InheritedFd::take`], for the descriptor in `config`.
pub unsafe fn run(config: VictimConfig) -> anyhow::Result<()> {
    // SAFETY: the caller's promise; it is taken once.
    let processes = unsafe { config.processes.take() };
    oom::take_score(FIRST)?;
    restraint::of_victim()?;
    // SAFETY: the process has one thread.
    match unsafe { fork() }.context("the owner")? {
        ForkResult::Child => own(processes),
        ForkResult::Parent { .. } => {
            drop(processes);
            // If this one ends before them, so do they.
            for _ in 0..2 {
                let ended = wait().context("the owner and the victim")?;
                ensure!(was_killed(ended), "the kernel has not killed: {ended:?}");
            }
            Ok(())
        }
    }
}

fn was_killed(status: WaitStatus) -> bool {
    matches!(status, WaitStatus::Signaled(_, Signal::SIGKILL, _))
}

/// The owner's life: it does nothing but wait to be killed.
fn own(processes: OwnedFd) -> ! {
    end_with_starter();
    alarm::set(PATIENCE);
    let mut stack = vec![0u128; STACK / size_of::<u128>()];
    let top = stack.as_mut_ptr_range().end;
    // The victim is the starter's child, which waits for it.
    let flags = libc::CLONE_VM | libc::CLONE_PARENT | libc::SIGCHLD;
    // SAFETY: the victim has the stack for itself, and neither that nor the descriptor goes away, since this
    // function doesn't return. From here on only the victim does anything, and makes system calls only.
    let started = unsafe {
        libc::clone(victim, top.cast(), flags, ptr::from_ref(&processes).cast_mut().cast())
    };
    if started > 0 {
        pause();
    }
    std::process::exit(1)
}

/// The victim's life, at whose end it has not been killed.
extern "C" fn victim(processes: *mut c_void) -> c_int {
    end_with_starter();
    // SAFETY: it is the owner's descriptor, whose memory this is.
    let processes = unsafe { &*processes.cast_const().cast::<OwnedFd>() };
    // Whatever goes wrong shows in that it ends by itself.
    let _ = take_memory(processes);
    1
}

/// Goes to the cgroup without memory and takes some. The kernel kills the process at that.
fn take_memory(processes: &OwnedFd) -> nix::Result<()> {
    nix::unistd::write(processes, b"0")?;
    for _ in 0..PIPES {
        let (_reader, writer) = nix::unistd::pipe2(nix::fcntl::OFlag::O_NONBLOCK)?;
        while nix::unistd::write(&writer, &PORTION).is_ok() {}
    }
    Ok(())
}

fn end_with_starter() {
    // SAFETY: plain numbers.
    unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
}
