//! The threads that serve a machine's devices.
//!
//! A thread costs as much as a good part of the jail, and a guest that ends soon may use no device at
//! all. So each is started when the guest first uses one of its devices, by the machine's first thread:
//! the processors', which see that first, may start none.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::KvmError;
use crate::borrow::borrow_fd;
use crate::jail::seccomp::threads::Thread;
use crate::transport::mmio::{Worker, WorkerHandle};

/// Which thread serves a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceGroup {
    /// Devices that wait for storage.
    Storage,
    /// Devices whose work is the host's network stack.
    Network,
    /// Devices that never wait.
    Streams,
}

impl DeviceGroup {
    fn thread(self) -> Thread {
        match self {
            Self::Storage => Thread::Storage,
            Self::Network => Thread::Network,
            Self::Streams => Thread::Streams,
        }
    }
}

/// A machine's workers, one for each group of its devices.
pub(super) struct Workers {
    workers: Vec<(DeviceGroup, Worker)>,
    wanted: Arc<EventFd>,
}

impl Workers {
    pub fn new() -> Result<Self, KvmError> {
        let wanted =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(KvmError::host("make an eventfd"))?;
        Ok(Self { workers: Vec::new(), wanted: Arc::new(wanted) })
    }

    /// What a device of this group is handed over with.
    pub fn handle(&mut self, group: DeviceGroup) -> WorkerHandle {
        if let Some((_, worker)) = self.workers.iter().find(|(known, _)| *known == group) {
            return worker.handle();
        }
        let worker = Worker::new(group.thread(), self.wanted.clone());
        let handle = worker.handle();
        self.workers.push((group, worker));
        handle
    }

    /// Readable when somebody waits for a worker's thread.
    pub fn wanted(&self) -> BorrowedFd<'_> {
        borrow_fd(&*self.wanted)
    }

    /// Starts the threads that somebody waits for.
    pub fn start_wanted(&self) -> Result<(), KvmError> {
        // Read first: who asks from here on is seen now or wakes again.
        let _ = self.wanted.read();
        self.start_those(Worker::is_wanted)
    }

    /// Starts the threads that aren't running.
    pub fn start_all(&self) -> Result<(), KvmError> {
        self.start_those(|_| true)
    }

    fn start_those(&self, which: impl Fn(&Worker) -> bool) -> Result<(), KvmError> {
        for (_, worker) in self.workers.iter().filter(|(_, worker)| which(worker)) {
            worker.start().map_err(KvmError::host("start a thread for devices"))?;
        }
        Ok(())
    }

    /// Lets nobody wait any longer for a thread that isn't running.
    pub fn refuse(&self) {
        for (_, worker) in &self.workers {
            worker.refuse();
        }
    }
}
