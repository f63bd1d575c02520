//! What a thread may not do although its process may: each is tried by a thread of each kind.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::path::Path;

use kiln_vmm::jail::identity;
use kiln_vmm::jail::seccomp::threads::{Thread, narrow};
use kiln_vmm::jail::seccomp::{ioctl, violation};
use libtest_mimic::Trial;

use crate::attempts::raw;
use crate::inmate::{Cell, Component, KEPT, REFUSED, SUCCEEDED};
use crate::trial;

struct Attempt {
    name: &'static str,
    /// As the documentation has it.
    what: &'static str,
    /// The system call that it is.
    call: &'static str,
    make: fn() -> io::Result<()>,
    /// The threads that do it for a living.
    trade_of: &'static [Thread],
}

const KEPT_FD: i64 = KEPT as i64;

/// Flags of a thread as the C library starts one.
const THREAD: i64 = 0x3d_0f00;

fn request(number: u32) -> io::Result<()> {
    raw(libc::SYS_ioctl, [KEPT_FD, i64::from(number), 0, 0, 0])
}

const ATTEMPTS: &[Attempt] = &[
    Attempt {
        name: "make_memory",
        what: "make a memory file",
        call: "memfd_create",
        make: || raw(libc::SYS_memfd_create, [c"x".as_ptr() as i64, 0, 0, 0, 0]),
        trade_of: &[],
    },
    Attempt {
        name: "start_thread",
        what: "start a thread",
        call: "clone",
        // The kernel refuses the address of its thread-local storage.
        make: || raw(libc::SYS_clone, [THREAD, 0, 0, 0, -1]),
        trade_of: &[],
    },
    Attempt {
        name: "other_list",
        what: "put another list on itself",
        call: "seccomp",
        make: || raw(libc::SYS_seccomp, [1, 0, 0, 0, 0]),
        trade_of: &[],
    },
    Attempt {
        name: "memory_slot",
        what: "give the guest other memory",
        call: "ioctl",
        make: || request(0x4020_ae46),
        trade_of: &[],
    },
    Attempt {
        name: "run_processor",
        what: "run a processor",
        call: "ioctl",
        make: || request(0xae80),
        trade_of: &[Thread::Processor],
    },
    Attempt {
        name: "interrupt",
        what: "raise an interrupt line",
        call: "ioctl",
        make: || request(ioctl::KVM_IRQ_LINE),
        trade_of: &[Thread::Processor, Thread::Serial],
    },
    Attempt {
        name: "discard",
        what: "discard blocks of a disk",
        call: "ioctl",
        make: || request(ioctl::BLKDISCARD),
        trade_of: &[Thread::Storage],
    },
    Attempt {
        name: "write_disk",
        what: "write to a place in a file",
        call: "pwrite64",
        make: || raw(libc::SYS_pwrite64, [KEPT_FD, 0, 0, 0, 0]),
        trade_of: &[Thread::Storage],
    },
    Attempt {
        name: "set_tap",
        what: "set a tap's offloads",
        call: "ioctl",
        make: || request(ioctl::TUNSETOFFLOAD),
        trade_of: &[Thread::Network],
    },
    Attempt {
        name: "take_message",
        what: "take a message, and descriptors with it",
        call: "recvmsg",
        make: || raw(libc::SYS_recvmsg, [-1, 0, 0, 0, 0]),
        trade_of: &[Thread::Processor, Thread::Streams, Thread::Waiting],
    },
    Attempt {
        name: "make_pair",
        what: "make a pair of sockets",
        call: "socketpair",
        make: || std::os::unix::net::UnixStream::pair().map(drop),
        trade_of: &[Thread::Streams],
    },
];

/// What a thread does in peace.
const GIVE_BACK: &str = "thread:give_memory_back";

/// Takes so much memory, in pieces that are no mappings of their own, that the C library gives it back.
fn give_memory_back() -> io::Result<()> {
    let thread = std::thread::spawn(|| {
        let pieces: Vec<Vec<u8>> = (0..200).map(|_| vec![1; 100 << 10]).collect();
        drop(pieces);
    });
    thread.join().map_err(|_| io::Error::other("panicked"))
}

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial("documentation_has_every_thread", documentation)];
    for component in Component::UNPRIVILEGED {
        let name = format!("{}_thread_gives_memory_back", component.name());
        trials.push(trial(name, move || {
            let (status, errors) = run(component, GIVE_BACK);
            assert_eq!(status, Some(i32::from(SUCCEEDED)), "{errors}");
        }));
    }
    for attempt in ATTEMPTS {
        let name = format!("process_may_{}", attempt.name);
        trials.push(trial(name, move || is_made(None, attempt)));
        for thread in Thread::ALL {
            let (name, allowed) = (thread.name(), attempt.trade_of.contains(&thread));
            let name = match allowed {
                true => format!("{name}_thread_may_{}", attempt.name),
                false => format!("{name}_thread_{}_ends_it", attempt.name),
            };
            trials.push(trial(name, move || match allowed {
                true => is_made(Some(thread), attempt),
                false => ends(thread, attempt),
            }));
        }
    }
    trials
}

/// Makes an attempt as a thread of a kind: in the jailed process, for the task of [`task`].
pub fn attempt(task: &str) -> Option<io::Result<()>> {
    if task == GIVE_BACK {
        return Some(give_memory_back());
    }
    let (thread, name) = task.split_once(':')?;
    let attempt = ATTEMPTS.iter().find(|attempt| attempt.name == name)?;
    if let Some(thread) = Thread::ALL.into_iter().find(|known| known.name() == thread) {
        narrow(thread);
    }
    Some((attempt.make)())
}

fn task(thread: Option<Thread>, attempt: &Attempt) -> String {
    format!("{}:{}", thread.map_or("process", Thread::name), attempt.name)
}

/// The exit status and the last words of a process in a component's place.
fn run(component: Component, task: &str) -> (Option<i32>, String) {
    let identity = identity::allocate().unwrap();
    let mut inmate = Cell { component, identity, seccomp: true, task, started_as: None }.start();
    let status = inmate.child.wait().unwrap();
    let errors = io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap();
    (status.code(), errors)
}

fn is_made(thread: Option<Thread>, attempt: &Attempt) {
    let (status, errors) = run(Component::Vmm, &task(thread, attempt));
    // With what it is made here the kernel may refuse it, but it is asked.
    let asked = [SUCCEEDED, REFUSED].map(|code| Some(i32::from(code)));
    assert!(asked.contains(&status), "{status:?}: {errors}");
}

fn ends(thread: Thread, attempt: &Attempt) {
    let (status, errors) = run(Component::Vmm, &task(Some(thread), attempt));
    assert_eq!(status, Some(violation::EXIT_STATUS), "{errors}");
    let expected = format!("a system call that its jail forbids: {} (number ", attempt.call);
    assert!(errors.contains(&expected), "{errors}");
}

/// The table of `docs/jail.md` is that of the attempts.
fn documentation() {
    let mut table = String::new();
    for attempt in ATTEMPTS {
        write!(table, "| {} | `{}` |", attempt.what, attempt.call).unwrap();
        for thread in Thread::ALL {
            let may = if attempt.trade_of.contains(&thread) { "its trade" } else { "ended" };
            write!(table, " {may} |").unwrap();
        }
        table.push('\n');
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/jail.md");
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(&table), "docs/jail.md should have these rows:\n{table}");
}
