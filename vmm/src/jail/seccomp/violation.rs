//! What happens when a jailed process makes a system call that its list doesn't allow.
//!
//! The handler runs in a process that may have been taken over, in any state: it uses no lock and
//! no allocation, only `write` and `exit_group`.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::ptr;
use std::sync::OnceLock;

use super::names;

/// The exit status of a sandbox's process that broke its rules: what a shell makes of a `SIGSYS`.
pub const EXIT_STATUS: i32 = 128 + libc::SIGSYS;

/// And of a command that jailed itself: that of its every failure.
pub const COMMAND_EXIT_STATUS: i32 = 1;

struct Report {
    process: &'static str,
    control: Option<RawFd>,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Has the first forbidden system call of this process reported as a
/// [`VmmEvent::Failed`](crate::config::VmmEvent) packet on `control`, and as a line on standard
/// error; the process ends with [`EXIT_STATUS`]. A command, which has no control socket, only says
/// the line and ends with [`COMMAND_EXIT_STATUS`].
///
/// `process` is what the process is called: ASCII letters.
pub fn report_to(process: &'static str, control: Option<BorrowedFd<'_>>) {
    let control = control.map(|control| control.as_raw_fd());
    let _ = REPORT.set(Report { process, control });
    // SAFETY: a zeroed sigaction is a valid one (empty mask); the handler has the signature that
    // SA_SIGINFO asks for and is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut());
    }
}

/// `SYS_SECCOMP` of `include/uapi/asm-generic/siginfo.h`.
const SYS_SECCOMP: i32 = 1;

/// `siginfo_t` as far as its `_sigsys` part on 64-bit machines.
#[repr(C)]
struct SigSys {
    signo: i32,
    errno: i32,
    code: i32,
    padding: i32,
    call_address: usize,
    call: i32,
    arch: u32,
}

extern "C" fn handler(_signal: i32, info: *const SigSys, _context: *const libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, whose layout this is.
    let (code, call) = unsafe { ((*info).code, (*info).call) };
    if code != SYS_SECCOMP {
        // SAFETY: ends the process at once, without running anything of it.
        unsafe { libc::_exit(EXIT_STATUS) }
    }
    let mut number = Line::new();
    number.text(" (number ").number(call.unsigned_abs()).text(")");
    let name = names::name(call.into()).unwrap_or("unknown");
    end(&["made a system call that its jail forbids: ", name, number.as_text()]);
}

/// Ends the process, and says that it did what these words say.
pub(super) fn end(words: &[&str]) -> ! {
    if let Some(report) = REPORT.get() {
        let mut line = Line::new();
        line.text("the ").text(report.process).text(" process ");
        for word in words {
            line.text(word);
        }

        let mut status = COMMAND_EXIT_STATUS;
        if let Some(control) = report.control {
            let mut packet = Line::new();
            packet.text(r#"{"failed":{"message":""#).bytes(line.as_bytes()).text(r#""}}"#);
            write(control, packet.as_bytes());
            status = EXIT_STATUS;
        }
        line.text("\n");
        write(libc::STDERR_FILENO, line.as_bytes());
        // SAFETY: ends the process at once, without running anything of it.
        unsafe { libc::_exit(status) }
    }
    // SAFETY: as above.
    unsafe { libc::_exit(EXIT_STATUS) }
}

fn write(fd: RawFd, bytes: &[u8]) {
    // SAFETY: the pointer and length are those of `bytes`. What can't be written is lost.
    unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
}

/// Text built on the stack; what doesn't fit is cut off.
struct Line {
    bytes: [u8; 256],
    length: usize,
}

impl Line {
    fn new() -> Self {
        Self { bytes: [0; 256], length: 0 }
    }

    fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        for (slot, byte) in self.bytes.iter_mut().skip(self.length).zip(bytes) {
            *slot = *byte;
            self.length += 1;
        }
        self
    }

    fn text(&mut self, text: &str) -> &mut Self {
        self.bytes(text.as_bytes())
    }

    fn number(&mut self, number: u32) -> &mut Self {
        let mut divisor = 1_000_000_000;
        while divisor > 1 && number < divisor {
            divisor /= 10;
        }
        while divisor > 0 {
            self.bytes(&[b'0' + (number / divisor % 10) as u8]);
            divisor /= 10;
        }
        self
    }

    /// Nothing if what was cut off was part of a character.
    fn as_text(&self) -> &str {
        std::str::from_utf8(self.as_bytes()).unwrap_or_default()
    }

    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_put_together_and_cut_off() {
        let mut line = Line::new();
        line.text("a").number(0).text(" ").number(4_294_967_295).number(307);
        assert_eq!(line.as_bytes(), b"a0 4294967295307");
        for _ in 0..100 {
            line.text("0123456789");
        }
        assert_eq!(line.as_bytes().len(), 256);
    }
}
