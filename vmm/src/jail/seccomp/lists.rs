//! What each kind of process may call.

pub mod threads;

use super::{Rule, When, allow, allow_when, ioctl};

/// Flags of `clone` with which the C library starts a thread, and no process.
const THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// glibc's `SIGSETXID` (sysdeps/unix/sysv/linux/internal-signals.h).
const SIGSETXID: u32 = 33;

const EXECUTABLE: u32 = libc::PROT_EXEC as u32;

/// What every thread needs: memory that isn't executable, locks, its wake-ups, what it says to the log and
/// to the monitor, its end and the process's.
pub const COMMON: &[Rule] = &[
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
pub const EVENTS: &[Rule] = &[
    allow(libc::SYS_epoll_ctl),
    allow(libc::SYS_epoll_wait),
    allow(libc::SYS_epoll_pwait),
    allow(libc::SYS_timerfd_settime),
    allow(libc::SYS_clock_nanosleep),
    allow(libc::SYS_nanosleep),
];

/// Descriptors of one's own, as many as one likes.
pub const COPIES: &[Rule] = &[
    allow(libc::SYS_dup),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_DUPFD_CLOEXEC as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_GETFL as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFL as u32)]),
];

/// Messages over sockets that are connected.
pub const MESSAGES: &[Rule] = &[
    allow(libc::SYS_recvfrom),
    allow(libc::SYS_recvmsg),
    allow_when(libc::SYS_sendto, &[When::Is(4, 0), When::Is(5, 0)]),
    allow(libc::SYS_sendmsg),
];

/// Files and block devices, by offset.
pub const DISKS: &[Rule] = &[
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

/// Starting threads.
pub const STARTS: &[Rule] = &[
    allow_when(libc::SYS_clone, &[When::Is(0, THREAD)]),
    // The C library's own signal, whose action it sets with a process's first thread.
    allow_when(libc::SYS_rt_sigaction, &[When::Is(0, SIGSETXID)]),
    allow(libc::SYS_rseq),
    allow(libc::SYS_sched_getaffinity),
    allow_when(libc::SYS_prctl, &[When::Is(0, libc::PR_SET_NAME as u32)]),
    // A narrower list for the thread that asks: no flag, thus nobody else's, and no descriptor for it.
    allow_when(libc::SYS_seccomp, &[When::Is(0, libc::SECCOMP_SET_MODE_FILTER), When::Is(1, 0)]),
];

/// Making descriptors that lead nowhere else, and looking at those that are there.
pub const DESCRIPTORS: &[Rule] = &[
    allow_when(libc::SYS_newfstatat, &[When::Is(3, libc::AT_EMPTY_PATH as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_SETFD as u32)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::FIONBIO)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::FIONREAD)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::TCGETS)]),
    allow(libc::SYS_eventfd2),
    allow(libc::SYS_epoll_create1),
    allow(libc::SYS_timerfd_create),
];

/// Streams over sockets that are connected. A new one exists only as a connected Unix pair.
pub const SOCKETS: &[Rule] = &[
    allow(libc::SYS_shutdown),
    allow(libc::SYS_getsockopt),
    allow_when(libc::SYS_socketpair, STREAM_PAIR),
];

/// Sockets that reach each other only: from one of datagrams, a message may name whom it is for.
const STREAM_PAIR: &[When] = &[
    When::Is(0, libc::AF_UNIX as u32),
    When::Is(1, (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as u32),
];

/// Taking connections on a listening socket that was handed over.
const ACCEPT: &[Rule] = &[allow(libc::SYS_accept4)];

const fn ioctls<const N: usize>(requests: &'static [[When; 1]; N]) -> [Rule; N] {
    let mut rules = [allow(libc::SYS_ioctl); N];
    let mut index = 0;
    while index < N {
        rules[index].when = &requests[index];
        index += 1;
    }
    rules
}

const fn requests<const N: usize>(numbers: &[u32]) -> [[When; 1]; N] {
    let mut requests = [[When::Is(1, 0)]; N];
    let mut index = 0;
    while index < N {
        requests[index] = [When::Is(1, numbers[index])];
        index += 1;
    }
    requests
}

const KVM_REQUESTS: [[When; 1]; ioctl::SET_UP.len()] = requests(ioctl::SET_UP);

/// Making a machine of KVM's.
pub const KVM: &[Rule] = &ioctls(&KVM_REQUESTS);

const PROCESSOR_REQUESTS: [[When; 1]; ioctl::PROCESSOR.len()] = requests(ioctl::PROCESSOR);

/// What a processor's thread asks of KVM.
pub const PROCESSOR: &[Rule] = &ioctls(&PROCESSOR_REQUESTS);

/// Setting up a tap that was handed over. Neither another interface nor a filter, an owner or an
/// address can be asked for.
const TAP: &[Rule] = &[
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::TUNGETIFF)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::TUNSETVNETHDRSZ)]),
    allow_when(libc::SYS_ioctl, &[When::Is(1, ioctl::TUNSETOFFLOAD)]),
];

/// `kiln vmm`.
pub const VMM: &[&[Rule]] = &[
    COMMON,
    STARTS,
    DESCRIPTORS,
    COPIES,
    EVENTS,
    DISKS,
    MESSAGES,
    SOCKETS,
    TAP,
    KVM,
    PROCESSOR,
    GUEST_MEMORY,
    VCPU_THREADS,
];

/// The file that is the guest's memory. It can't be executed: neither `mmap` nor `execveat` would.
const GUEST_MEMORY: &[Rule] = &[
    allow(libc::SYS_memfd_create),
    allow(libc::SYS_ftruncate),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_ADD_SEALS as u32)]),
    allow_when(libc::SYS_fcntl, &[When::Is(1, libc::F_GET_SEALS as u32)]),
];

/// The signal that interrupts a vCPU's thread: `SIGRTMIN` as the C library counts.
const KICK: u32 = 34;

/// Being interrupted.
const VCPU_THREADS: &[Rule] = &[allow_when(libc::SYS_rt_sigaction, &[When::Is(0, KICK)])];

/// `kiln devices`.
pub const DEVICES: &[&[Rule]] =
    &[COMMON, STARTS, DESCRIPTORS, COPIES, EVENTS, DISKS, MESSAGES, SOCKETS, TAP, ACCEPT];
