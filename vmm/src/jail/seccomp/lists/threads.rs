//! What each kind of thread may call: parts of what its process may.

use super::super::{Rule, When, allow, allow_when, ioctl};
use super::{ACCEPT, EXECUTABLE, TAP, ioctls, requests};

/// What every thread needs: memory that isn't executable, locks, its wake-ups, what it says to the log and
/// to the monitor, its end and the process's.
const COMMON: &[Rule] = &[
    allow(libc::SYS_brk),
    allow_when(libc::SYS_mmap, &[When::Lacks(2, EXECUTABLE)]),
    allow_when(libc::SYS_mprotect, &[When::Lacks(2, EXECUTABLE)]),
    allow(libc::SYS_munmap),
    allow(libc::SYS_mremap),
    allow(libc::SYS_madvise),
    allow(libc::SYS_futex),
    allow(libc::SYS_sched_yield),
    allow(libc::SYS_set_robust_list),
    allow(libc::SYS_sigaltstack),
    allow(libc::SYS_rt_sigprocmask),
    allow(libc::SYS_rt_sigreturn),
    allow(libc::SYS_restart_syscall),
    allow(libc::SYS_gettid),
    allow(libc::SYS_getpid),
    allow_when(libc::SYS_tgkill, &[When::IsOwnPid(0)]),
    allow(libc::SYS_exit),
    allow(libc::SYS_exit_group),
    allow(libc::SYS_clock_gettime),
    allow(libc::SYS_gettimeofday),
    allow(libc::SYS_getrandom),
    allow(libc::SYS_read),
    allow(libc::SYS_write),
    allow(libc::SYS_close),
    // The standard library looks whether a descriptor is open before it closes it, in debug builds.
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFD as u32)]),
    allow(libc::SYS_poll),
    allow(libc::SYS_ppoll),
];

/// Waiting for many descriptors, and for points in time.
const EVENTS: &[Rule] = &[
    allow(libc::SYS_epoll_ctl),
    allow(libc::SYS_epoll_wait),
    allow(libc::SYS_epoll_pwait),
    allow(libc::SYS_timerfd_settime),
    allow(libc::SYS_clock_nanosleep),
    allow(libc::SYS_nanosleep),
];

/// Descriptors of one's own, as many as one likes.
const COPIES: &[Rule] = &[
    allow(libc::SYS_dup),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFL as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFL as u32)]),
];

/// Messages over sockets that are connected.
const MESSAGES: &[Rule] = &[
    allow(libc::SYS_recvfrom),
    allow(libc::SYS_recvmsg),
    allow_when(libc::SYS_sendto, &[When::Is(4, 0), When::Is(5, 0)]),
    allow(libc::SYS_sendmsg),
];

const PROCESSOR_REQUESTS: [[When; 1]; ioctl::PROCESSOR.len()] = requests(ioctl::PROCESSOR);

/// Running a processor, connecting a device's doorbells and interrupt, and telling a device's process of
/// its queues.
pub const PROCESSOR: &[&[Rule]] = &[COMMON, COPIES, MESSAGES, &ioctls(&PROCESSOR_REQUESTS)];

/// Files and block devices, by offset.
const DISKS: &[Rule] = &[
    allow(libc::SYS_readv),
    allow(libc::SYS_pread64),
    allow(libc::SYS_preadv),
    allow(libc::SYS_writev),
    allow(libc::SYS_pwrite64),
    allow(libc::SYS_pwritev),
    allow(libc::SYS_lseek),
    allow(libc::SYS_fstat),
    allow_when(libc::SYS_statx, &[When::Is(2, libc::AT_EMPTY_PATH as u32)]),
    allow(libc::SYS_fsync),
    allow(libc::SYS_fdatasync),
    allow(libc::SYS_fallocate),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::BLKGETSIZE64)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::BLKSSZGET)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::BLKDISCARD)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::BLKZEROOUT)]),
];

/// Serving disks, and giving memory back.
pub const STORAGE: &[&[Rule]] = &[COMMON, EVENTS, DISKS];

/// Packets of a tap.
const PACKETS: &[Rule] = &[allow(libc::SYS_readv), allow(libc::SYS_writev)];

/// Serving network devices.
pub const NETWORK: &[&[Rule]] = &[COMMON, EVENTS, PACKETS, TAP];

/// Streams of connections, each of which comes as one end of a new pair.
const CONNECTIONS: &[Rule] = &[
    allow(libc::SYS_readv),
    allow(libc::SYS_writev),
    allow(libc::SYS_shutdown),
    allow(libc::SYS_getsockopt),
    allow_when(libc::SYS_socketpair, &[When::Is(0, libc::AF_UNIX as u32)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::FIONBIO)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::FIONREAD)]),
];

/// Serving vsock, the console and random numbers.
pub const STREAMS: &[&[Rule]] = &[COMMON, EVENTS, COPIES, MESSAGES, CONNECTIONS];

const SERIAL_REQUESTS: [[When; 1]; 1] = requests(&[ioctl::KVM_IRQ_LINE]);

/// Moving a console's bytes, and interrupting the guest for them.
pub const SERIAL: &[&[Rule]] = &[COMMON, &ioctls(&SERIAL_REQUESTS)];

/// Waiting for the end of a connection.
pub const WATCH: &[&[Rule]] = &[COMMON];

/// Waiting for the other threads, and telling the monitor how it went.
pub const WAITING: &[&[Rule]] = &[COMMON, MESSAGES];

/// What a device's thread needs beside its device if its driver is in another process: that one's
/// connection, and the guest memory that comes over it.
pub const SERVER: &[&[Rule]] = &[COMMON, EVENTS, COPIES, MESSAGES, ACCEPT, NEW_DESCRIPTORS];

const NEW_DESCRIPTORS: &[Rule] = &[
    allow(libc::SYS_eventfd2),
    allow(libc::SYS_epoll_create1),
    allow(libc::SYS_fstat),
    allow_when(libc::SYS_statx, &[When::Is(2, libc::AT_EMPTY_PATH as u32)]),
    allow(libc::SYS_lseek),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::FIONBIO)]),
];
