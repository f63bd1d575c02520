//! bpf(2): handing a program to the kernel and putting it to a cgroup.
//!
//! The kernel keeps the program until the cgroup is removed.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use super::Program;

/// `BPF_PROG_LOAD` and `BPF_PROG_ATTACH`.
const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
/// `BPF_PROG_TYPE_CGROUP_DEVICE`.
const TYPE_CGROUP_DEVICE: u32 = 15;
/// `BPF_CGROUP_DEVICE`.
const AT_DEVICES: u32 = 6;
/// `BPF_F_ALLOW_MULTI`: cgroups below may have programs of their own, all of which must agree.
const BESIDE_OTHERS: u32 = 2;

/// The beginning of `union bpf_attr` for a load; what follows is zero.
#[repr(C)]
#[derive(Default)]
struct Load {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    licence: u64,
    log_level: u32,
    log_size: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
}

/// The beginning of `union bpf_attr` for an attachment.
#[repr(C)]
struct Attach {
    target: u32,
    program: u32,
    attach_type: u32,
    flags: u32,
}

impl Program {
    /// Puts the directory `cgroup` and all below it under the program.
    ///
    /// # Errors
    /// `EPERM` without `CAP_BPF` and `CAP_NET_ADMIN` or `CAP_SYS_ADMIN`, `E2BIG` for a program of more
    /// than a million instructions, `EBADF` if the directory is none of cgroup v2, `EINVAL` if the
    /// kernel has no such programs.
    pub fn attach(&self, cgroup: BorrowedFd<'_>) -> io::Result<()> {
        let instructions = self.instructions();
        let load = Load {
            program_type: TYPE_CGROUP_DEVICE,
            instruction_count: u32::try_from(instructions.len())
                .map_err(|_| io::Error::from_raw_os_error(libc::E2BIG))?,
            instructions: instructions.as_ptr() as u64,
            // It calls nothing that asks for a particular one.
            licence: c"Apache-2.0".as_ptr() as u64,
            ..Load::default()
        };
        // SAFETY: the attributes point at as many instructions as they say and at a string with its
        // end, all of which live until the call returns.
        let program = unsafe { bpf(PROGRAM_LOAD, &load) }?;
        // SAFETY: a descriptor that the kernel has just made, and nobody else has.
        let program = unsafe { OwnedFd::from_raw_fd(program) };
        let attach = Attach {
            target: cgroup.as_raw_fd() as u32,
            program: program.as_raw_fd() as u32,
            attach_type: AT_DEVICES,
            flags: BESIDE_OTHERS,
        };
        // SAFETY: there are no pointers in the attributes.
        unsafe { bpf(PROGRAM_ATTACH, &attach) }.map(drop)
    }
}

/// # Safety
/// `attributes` is the beginning of `union bpf_attr` as `command` has it.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    let attributes: *const T = attributes;
    // SAFETY: the caller's promise; the kernel reads as many bytes as it is told.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result as libc::c_int)
}
