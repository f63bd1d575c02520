//! Threads of a jailed process, each under a list of its own.
//!
//! The process's list ([`super::install`]) has what its threads take together, and what it takes to
//! start them. A thread that has come to its one kind of work puts a second, narrower list on itself
//! ([`narrow`]): from then on a call must be on both. None but the process's first thread starts
//! others, so no list is inherited by a thread with other work.
//!
//! What a list lacks is what its thread has no use for: a processor's thread, which sees the guest's
//! accesses first, makes no memory, no slot for it, no socket, no thread, and reads and writes no file by
//! offset; the one that serves disks reaches no socket and asks nothing of KVM; the one that serves
//! streams reaches no disk.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use seccompiler::sock_filter;

use super::lists::threads as lists;
use super::program::compile;
use super::{Rule, violation};

/// What a thread does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thread {
    /// Runs a processor, and answers what its guest asks of devices' registers.
    Processor,
    /// Serves devices that wait for storage, or give memory back.
    Storage,
    /// Serves network devices.
    Network,
    /// Serves devices that never wait: vsock, console, random numbers.
    Streams,
    /// Moves the bytes of the serial console.
    Serial,
    /// Waits until a connection is closed.
    Watch,
    /// The first one, once it only waits for the others.
    Waiting,
}

impl Thread {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::Processor,
        Self::Storage,
        Self::Network,
        Self::Streams,
        Self::Serial,
        Self::Watch,
        Self::Waiting,
    ];

    /// What the thread of a worker is called.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Processor => "vcpu",
            Self::Storage => "storage",
            Self::Network => "network",
            Self::Streams => "streams",
            Self::Serial => "serial",
            Self::Watch => "watch",
            Self::Waiting => "waiting",
        }
    }

    fn lists(self) -> &'static [&'static [Rule]] {
        match self {
            Self::Processor => lists::PROCESSOR,
            Self::Storage => lists::STORAGE,
            Self::Network => lists::NETWORK,
            Self::Streams => lists::STREAMS,
            Self::Serial => lists::SERIAL,
            Self::Watch => lists::WATCH,
            Self::Waiting => lists::WAITING,
        }
    }

    /// Its filter, which all threads of the kind share.
    fn filter(self) -> &'static [sock_filter] {
        static COMPILED: [OnceLock<Vec<sock_filter>>; Thread::ALL.len()] =
            [const { OnceLock::new() }; Thread::ALL.len()];
        COMPILED[self as usize].get_or_init(|| compile(self.lists()))
    }
}

/// Whether the process is under its list.
static CONFINED: AtomicBool = AtomicBool::new(false);

pub(super) fn process_is_confined() {
    CONFINED.store(true, Ordering::SeqCst);
}

/// [`narrow`] for a thread whose device has its driver in another process, over vhost-user.
pub fn narrow_server(device: Thread) {
    let lists: Vec<_> = device.lists().iter().chain(lists::SERVER).copied().collect();
    confine(device, || super::load(&compile(&lists)));
}

/// Puts the calling thread under the list of what it does, for good, if the process is under one
/// ([`super::install`]); a process that isn't in a jail has no use for it.
///
/// A thread that can't be confined doesn't go on: the process ends as after a call that isn't allowed,
/// and says why.
pub fn narrow(thread: Thread) {
    confine(thread, || super::load(thread.filter()));
}

fn confine(thread: Thread, load: impl FnOnce() -> io::Result<()>) {
    if !CONFINED.load(Ordering::SeqCst) {
        return;
    }
    if let Err(error) = load() {
        let error = error.to_string();
        violation::end(&["could not confine its thread ", thread.name(), ": ", &error]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(thread: Thread, call: libc::c_long) -> bool {
        thread.lists().iter().copied().flatten().any(|rule| rule.call == call)
    }

    #[test]
    fn no_list_allows_what_only_the_first_thread_does() {
        let of_the_first = [
            libc::SYS_clone,
            libc::SYS_seccomp,
            libc::SYS_memfd_create,
            libc::SYS_socketpair,
            libc::SYS_rt_sigaction,
            libc::SYS_epoll_create1,
        ];
        for thread in Thread::ALL {
            for call in of_the_first {
                let streams = thread == Thread::Streams && call == libc::SYS_socketpair;
                assert!(!allows(thread, call) || streams, "{thread:?}: {call}");
            }
        }
    }

    #[test]
    fn every_rule_is_one_of_a_process_too() {
        let of_a_process = |rule: &Rule| {
            let mut all = super::super::VMM.iter().chain(super::super::DEVICES).copied().flatten();
            all.any(|known| known.call == rule.call)
        };
        for thread in Thread::ALL {
            for rule in thread.lists().iter().copied().flatten() {
                assert!(of_a_process(rule), "{thread:?}: {}", rule.call);
            }
        }
    }
}
