//! What a guest learns from its host: the time, and randomness to start from.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::time::{ClockId, Timespec};

/// `RNDADDENTROPY` of linux/random.h: `_IOW('R', 0x03, int [2])`.
const RNDADDENTROPY: libc::Ioctl = 0x4008_5203;

/// Sets the wall clock to a time in nanoseconds since 1970.
///
/// # Errors
/// `EINVAL` for a time before 1970.
pub fn set(unix_time_ns: i64) -> io::Result<()> {
    const SECOND: i64 = 1_000_000_000;
    let (seconds, nanoseconds) = (unix_time_ns.div_euclid(SECOND), unix_time_ns.rem_euclid(SECOND));
    let time = Timespec { tv_sec: seconds, tv_nsec: nanoseconds };
    Ok(rustix::time::clock_settime(ClockId::Realtime, time)?)
}

/// `struct rand_pool_info` with 32 bytes.
#[repr(C)]
struct Entropy {
    bits: libc::c_int,
    size: libc::c_int,
    bytes: [u8; 32],
}

/// Adds 32 bytes of the host's randomness to the kernel's pool and credits it with all of it.
///
/// # Errors
/// As the ioctl of random(4).
pub fn credit_entropy(bytes: [u8; 32]) -> io::Result<()> {
    let device = File::options().write(true).open("/dev/urandom")?;
    let entropy = Entropy { bits: 256, size: 32, bytes };
    // SAFETY: the request takes a `struct rand_pool_info` whose size field says how many bytes
    // follow; it lives for the call.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), RNDADDENTROPY, &raw const entropy) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
