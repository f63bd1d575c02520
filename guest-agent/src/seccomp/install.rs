//! Handing a compiled filter to the kernel.

use std::io;

use seccompiler::BpfProgram;

/// A compiled filter, ready to be installed.
#[derive(Debug, Clone)]
pub struct Filter {
    program: BpfProgram,
    flags: u32,
}

impl Filter {
    pub(super) fn new(program: BpfProgram, flags: u32) -> Self {
        Self { program, flags }
    }

    /// The BPF program.
    pub fn program(&self) -> &BpfProgram {
        &self.program
    }

    /// Puts the calling thread under the filter, for good. The thread has either no_new_privs or
    /// `CAP_SYS_ADMIN` in its user namespace.
    ///
    /// # Errors
    /// Whatever seccomp(2) says.
    pub fn install(&self) -> io::Result<()> {
        let header = libc::sock_fprog {
            len: u16::try_from(self.program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            filter: self.program.as_ptr().cast_mut().cast(),
        };
        // SAFETY: the header points at `len` instructions of the layout of `struct sock_filter`,
        // which live until the call returns; the kernel copies and checks them.
        let result = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                self.flags,
                &raw const header,
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}
