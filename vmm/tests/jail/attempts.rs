//! How each attack is made; in the jailed process.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::IntoRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{self, UnixStream};
use std::ptr;
use std::time::SystemTime;

use crate::inmate::KEPT;

pub fn connect_out() -> io::Result<()> {
    let port = std::env::var("LISTENER").unwrap().parse().unwrap();
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)))?;
    stream.read(&mut []).map(drop)
}

/// To a socket of the parent's without a name in the file system.
pub fn connect_near() -> io::Result<()> {
    let name = std::env::var("ABSTRACT").unwrap();
    UnixStream::connect_addr(&net::SocketAddr::from_abstract_name(name)?).map(drop)
}

pub fn fill_disk() -> io::Result<()> {
    let mut last = Ok(());
    for directory in ["", "/tmp", "/var/tmp", "/dev/shm", "/proc", "/usr"] {
        match File::create(format!("{directory}/filler")) {
            Ok(mut file) => return file.write_all(&[0; 1 << 20]),
            Err(error) => last = Err(error),
        }
    }
    last
}

/// `/dev/null`, with the device's numbers.
pub fn open_device() -> io::Result<()> {
    let mode = i64::from(libc::S_IFCHR | 0o666);
    let device = rustix::fs::makedev(1, 3) as i64;
    let make = |path: &CStr| {
        raw(libc::SYS_mknodat, [libc::AT_FDCWD.into(), path.as_ptr() as i64, mode, device, 0])
    };
    match make(c"/rootfs/device") {
        Ok(()) => File::open("/rootfs/device").map(drop),
        Err(_) => make(c"/device").and_then(|()| File::open("/device").map(drop)),
    }
}

pub fn take_descriptor() -> io::Result<()> {
    // SAFETY: plain numbers.
    let process = unsafe { libc::syscall(libc::SYS_pidfd_open, parent(), 0) };
    if process < 0 {
        return Err(io::Error::last_os_error());
    }
    raw(libc::SYS_pidfd_getfd, [process, 0, 0, 0, 0])
}

/// To what it is.
pub fn set_clock() -> io::Result<()> {
    let now = SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let time = [now.as_secs() as i64, i64::from(now.subsec_nanos())];
    raw(libc::SYS_clock_settime, [0, time.as_ptr() as i64, 0, 0, 0])
}

pub fn raw(call: libc::c_long, arguments: [i64; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: attacks pass numbers and pointers to what lives as long as the call.
    match unsafe { libc::syscall(call, a, b, c, d, e, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The test process: the inmate's parent.
pub fn parent() -> i64 {
    std::env::var("PARENT").unwrap().parse().unwrap()
}

/// Opens a file beside the share by the handle that it has outside.
pub fn open_by_handle() -> io::Result<()> {
    let handle = std::env::var("HANDLE").unwrap();
    let bytes = handle.as_bytes().chunks(2).map(|digits| std::str::from_utf8(digits).unwrap());
    let handle: Vec<u8> = bytes.map(|digits| u8::from_str_radix(digits, 16).unwrap()).collect();
    // Something on its file system, for whoever has that; the others can only try.
    let share = match std::env::var("COMPONENT").unwrap().as_str() {
        "fs" => File::open("/rootfs")?.into_raw_fd(),
        _ => KEPT,
    };
    raw(libc::SYS_open_by_handle_at, [share.into(), handle.as_ptr() as i64, 0, 0, 0])
}

pub fn read_memory_of_parent() -> io::Result<()> {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: 0x40_0000 as *mut _, iov_len: 1 };
    let (local, remote) = (&raw const local as i64, &raw const remote as i64);
    raw(libc::SYS_process_vm_readv, [parent(), local, 1, remote, 1])
}

pub fn mount_tmpfs() -> io::Result<()> {
    let (kind, at) = (c"tmpfs".as_ptr() as i64, c"/".as_ptr() as i64);
    raw(libc::SYS_mount, [kind, at, kind, 0, 0])
}

pub fn raise_capabilities() -> io::Result<()> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let all: [u32; 6] = [u32::MAX; 6];
    raw(libc::SYS_capset, [&raw const header as i64, &raw const all as i64, 0, 0, 0])
}

pub fn execute_memory_file() -> io::Result<()> {
    let empty = c"".as_ptr() as i64;
    raw(libc::SYS_execveat, [4, empty, 0, 0, i64::from(libc::AT_EMPTY_PATH)])
}

pub fn map(protection: i32) -> io::Result<()> {
    // SAFETY: a new mapping that nobody uses.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ | protection, flags, -1, 0)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub fn make_executable() -> io::Result<()> {
    // SAFETY: a new mapping that nobody else uses.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    raw(libc::SYS_mprotect, [mapped as i64, 4096, 5, 0, 0])
}

pub fn add_key() -> io::Result<()> {
    let (kind, name) = (c"user".as_ptr() as i64, c"kiln-test".as_ptr() as i64);
    raw(libc::SYS_add_key, [kind, name, name, 4, -1])
}

pub fn io_uring() -> io::Result<()> {
    let mut parameters = [0u8; 120];
    raw(libc::SYS_io_uring_setup, [1, parameters.as_mut_ptr() as i64, 0, 0, 0])
}

pub fn perf_of_everyone() -> io::Result<()> {
    // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, on all of CPU 0.
    let mut attributes = [0u32; 32];
    attributes[0] = 1;
    attributes[1] = 128;
    raw(libc::SYS_perf_event_open, [attributes.as_ptr() as i64, -1, 0, -1, 0])
}

pub fn raise_core_limit() -> io::Result<()> {
    let limit = [u64::MAX; 2];
    raw(libc::SYS_prlimit64, [0, 4, limit.as_ptr() as i64, 0, 0])
}
