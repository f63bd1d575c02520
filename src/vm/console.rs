//! A guest's console on the user's terminal.
//!
//! The terminal is in raw mode, so that what is typed reaches the guest as it is. Ctrl-A X ends the
//! guest; Ctrl-A Ctrl-A sends one Ctrl-A.

use std::io::{self, IsTerminal, PipeReader, PipeWriter, Read, Write};
use std::os::fd::OwnedFd;
use std::thread;

use crate::terminal::RawMode;

const ESCAPE: u8 = 1;

/// What a key sequence asks for.
#[derive(Debug, PartialEq, Eq)]
enum Key {
    /// These bytes go to the guest.
    Send(Vec<u8>),
    /// The guest is to end.
    End,
}

/// Finds escape sequences in what is typed, wherever it is split.
#[derive(Debug, Default)]
struct Escapes {
    pending: bool,
}

impl Escapes {
    fn take(&mut self, typed: &[u8]) -> Key {
        let mut send = Vec::with_capacity(typed.len());
        for &byte in typed {
            match (std::mem::take(&mut self.pending), byte) {
                (true, b'x' | b'X') => return Key::End,
                (true, ESCAPE) => send.push(ESCAPE),
                (false, ESCAPE) => self.pending = true,
                (true, other) => send.extend([ESCAPE, other]),
                (false, other) => send.push(other),
            }
        }
        Key::Send(send)
    }
}

/// The user's side of a console.
#[derive(Debug)]
pub struct Console {
    /// Restores the terminal when dropped.
    _raw_mode: RawMode,
    /// What the guest reads.
    pub input: PipeReader,
    /// Readable, or closed, once the user wants the guest to end.
    pub ended: PipeReader,
}

impl Console {
    /// Takes the terminal on standard input over, if there is one.
    ///
    /// # Errors
    /// The terminal can't be switched to raw mode, or no descriptors are left.
    pub fn on_terminal() -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() {
            return Ok(None);
        }
        let raw_mode = RawMode::enter()?;
        let (input, typed) = io::pipe()?;
        let (ended, end) = io::pipe()?;
        thread::Builder::new().name("kiln-console".to_owned()).spawn(|| watch(typed, end))?;
        Ok(Some(Self { _raw_mode: raw_mode, input, ended }))
    }
}

/// Passes on what is typed until the guest or the user ends.
fn watch(mut typed: PipeWriter, mut end: PipeWriter) {
    let mut escapes = Escapes::default();
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = io::stdin().read(&mut buffer) {
        match escapes.take(&buffer[..length]) {
            Key::Send(bytes) if typed.write_all(&bytes).is_ok() => {}
            Key::Send(_) => return thread::park(),
            Key::End => {
                // Whoever waits for it is there for as long as the process is.
                let _ = end.write_all(b"x");
                return;
            }
        }
    }
    // The terminal is gone; its hang-up signal ends the process.
    thread::park();
}

/// Copies a guest's output to standard output until its end.
///
/// # Errors
/// No thread.
pub fn show(mut output: PipeReader) -> io::Result<thread::JoinHandle<()>> {
    let showing = move || {
        let mut buffer = [0; 16 << 10];
        let mut stdout = io::stdout().lock();
        while let Ok(length @ 1..) = output.read(&mut buffer) {
            if stdout.write_all(&buffer[..length]).and_then(|()| stdout.flush()).is_err() {
                return;
            }
        }
    };
    thread::Builder::new().name("kiln-console".to_owned()).spawn(showing)
}

/// Standard input or output itself, for a machine that gets it without a translation.
///
/// # Errors
/// No descriptors are left.
pub fn standard(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: standard streams are open for the whole life of the process.
    unsafe { std::os::fd::BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn escapes_are_found_across_reads() {
        let mut escapes = Escapes::default();
        assert_eq!(escapes.take(b"ab\x01"), Key::Send(b"ab".to_vec()));
        assert_eq!(escapes.take(b"\x01c"), Key::Send(b"\x01c".to_vec()));
        assert_eq!(escapes.take(b"\x01q"), Key::Send(b"\x01q".to_vec()));
        assert_eq!(escapes.take(b"x\x01"), Key::Send(b"x".to_vec()));
        assert_eq!(escapes.take(b"x"), Key::End);
    }
}
