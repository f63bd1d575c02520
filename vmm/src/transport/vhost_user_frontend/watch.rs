//! Notices when the process that serves a device goes away.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::borrow::borrow_fd;
use crate::jail::seccomp::threads::{Thread, narrow};
use crate::transport::Interrupt;

/// `InterruptStatus`: the configuration, which includes the device's status, has changed.
const CONFIGURATION_CHANGED: u32 = 2;

type OnLost = Box<dyn FnOnce() + Send>;

struct Shared {
    /// The driver that waits for the device, if any.
    driver: Mutex<Option<Interrupt>>,
    on_lost: Mutex<Option<OnLost>>,
}

impl Shared {
    fn lost(&self) {
        let driver = self.driver.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(interrupt) = driver {
            interrupt.needs_reset.store(true, Ordering::SeqCst);
            interrupt.status.fetch_or(CONFIGURATION_CHANGED, Ordering::SeqCst);
            // Fails only when the counter is full, and then the interrupt is raised already.
            let _ = interrupt.eventfd.write(1);
        }
        let on_lost = self.on_lost.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(on_lost) = on_lost {
            on_lost();
        }
    }
}

/// A thread that waits for the other end of a connection to close.
pub struct Watch {
    shared: Arc<Shared>,
    /// Writing to it stops the thread.
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Watch {
    /// Watches `connection`.
    ///
    /// # Errors
    /// When the host has no descriptor or thread left.
    pub fn new(
        connection: &UnixStream,
        on_lost: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let connection = OwnedFd::from(connection.try_clone()?);
        let stop = EventFd::new(EFD_CLOEXEC)?;
        let stopped = stop.try_clone()?;
        let shared = Arc::new(Shared {
            driver: Mutex::new(None),
            on_lost: Mutex::new(Some(Box::new(on_lost))),
        });
        let thread_shared = Arc::clone(&shared);
        let wait = move || {
            narrow(Thread::Watch);
            if !closes_first(&connection, &stopped) {
                return;
            }
            thread_shared.lost();
        };
        let thread = std::thread::Builder::new().name("vhost-user".to_owned()).spawn(wait)?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// From now on the driver behind `interrupt` waits for the device.
    pub fn tell_driver(&self, interrupt: Interrupt) {
        *self.shared.driver.lock().unwrap_or_else(PoisonError::into_inner) = Some(interrupt);
    }

    /// No driver waits for the device any more.
    pub fn forget_driver(&self) {
        *self.shared.driver.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Gives the peer up.
    pub fn lose(&self) {
        self.shared.lost();
    }
}

/// Whether the connection's other end closes before somebody writes to `stopped`.
fn closes_first(connection: &OwnedFd, stopped: &EventFd) -> bool {
    let stopped = PollFd::from_borrowed_fd(borrow_fd(stopped), PollFlags::IN);
    let mut fds = [PollFd::new(connection, PollFlags::RDHUP), stopped];
    loop {
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return true,
            Ok(_) => return fds[1].revents().is_empty(),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        // Fails only when the counter is full, and then the thread is told already.
        let _ = self.stop.write(1);
        if let Some(thread) = self.thread.take() {
            // Its panic, if any, has been reported where it happened.
            let _ = thread.join();
        }
    }
}
