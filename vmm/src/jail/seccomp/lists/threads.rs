//! What each kind of thread may call: parts of what its process may.

use super::super::{Rule, When, allow, allow_when, ioctl};
use super::{ACCEPT, COMMON, COPIES, DISKS, EVENTS, MESSAGES, STREAM_PAIR, TAP, ioctls, requests};

/// Running a processor, connecting a device's doorbells and interrupt, and telling a device's process of
/// its queues.
pub const PROCESSOR: &[&[Rule]] = &[COMMON, COPIES, MESSAGES, super::PROCESSOR];

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
    allow_when(libc::SYS_socketpair, STREAM_PAIR),
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
