//! Gets a vCPU's thread out of `KVM_RUN` from another thread.
//!
//! Two things together leave no gap: the `immediate_exit` byte makes a `KVM_RUN` that is about to
//! begin return at once, and a signal interrupts one that is under way, or any other system call
//! the thread waits in.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Once;
use std::sync::atomic::{AtomicU8, Ordering};
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use rustix::mm::{MapFlags, ProtFlags};
use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

use super::KvmError;
use crate::borrow::borrow_fd;

/// The beginning of a vCPU's `kvm_run` area, mapped for this purpose alone.
pub(super) struct Kick {
    run: *mut kvm_run,
}

// SAFETY: the mapping belongs to this value alone, and its one byte that is accessed is accessed
// atomically.
unsafe impl Send for Kick {}

const MAPPED: usize = 4096;

impl Kick {
    /// Prepares to kick `vcpu`.
    pub fn new(vcpu: &VcpuFd) -> Result<Self, KvmError> {
        install_handler()?;
        // SAFETY: a new mapping at an address of the kernel's choice; a vCPU's first page is the
        // beginning of its `kvm_run`.
        let run = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                MAPPED,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                borrow_fd(vcpu),
                0,
            )
        }
        .map_err(KvmError::host("map a vCPU"))?;
        Ok(Self { run: run.cast() })
    }

    /// Makes every further `KVM_RUN` of the vCPU return at once, and interrupts `thread`.
    pub fn kick<T>(&self, thread: &JoinHandle<T>) {
        // SAFETY: the mapping is as long as a page and lives as long as `self`; the kernel reads
        // the byte whenever it likes, hence atomically.
        let immediate_exit = unsafe { AtomicU8::from_ptr(&raw mut (*self.run).immediate_exit) };
        immediate_exit.store(1, Ordering::SeqCst);
        interrupt(thread);
    }
}

impl Drop for Kick {
    fn drop(&mut self) {
        // SAFETY: the mapping of `new`, which nothing else refers to.
        let _ = unsafe { rustix::mm::munmap(self.run.cast(), MAPPED) };
    }
}

/// Interrupts the system call that `thread` waits in, if it does.
pub(super) fn interrupt<T>(thread: &JoinHandle<T>) {
    if thread.is_finished() {
        return;
    }
    // SAFETY: the thread has not been joined, for its handle is here, so its id is valid.
    unsafe { libc::pthread_kill(thread.as_pthread_t(), SIGRTMIN()) };
}

/// Installs the signal's handler, which does nothing, once for the process.
pub(super) fn install_handler() -> Result<(), KvmError> {
    extern "C" fn nothing(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    static INSTALLED: Once = Once::new();
    let mut result = Ok(());
    INSTALLED.call_once(|| result = register_signal_handler(SIGRTMIN(), nothing));
    result.map_err(|e| KvmError::Host {
        what: "install a signal handler",
        source: io::Error::from(e),
    })
}
