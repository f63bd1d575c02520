//! Copies between vsock streams and the caller's own standard streams.
//!
//! Each direction is a thread with blocking calls and one buffer: the caller's descriptors are
//! shared with other processes, so they can't be made non-blocking, and a thread that waits for a
//! slow reader holds back nothing but its own stream, which holds back the guest's writer.
//!
//! A reader of standard output that goes away is to the step what it is to a local process: the
//! stream is closed towards the guest, and the step gets `SIGPIPE` when it writes again.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use kiln_protocol::{STREAM_PORT, Stdio, StreamHeader, StreamToken, WindowSize};
use tokio::sync::mpsc::Sender;

use super::broker::Broker;
use super::events::Event;

/// What is moved at once: as much as a vsock packet holds, several times.
const BUFFER: usize = 256 << 10;

/// What output streams are about, for whoever waits for their end.
#[derive(Debug, Default)]
pub struct Activity {
    /// Reads from the guest so far.
    reads: AtomicU64,
    /// Streams that wait for the caller's reader.
    writing: AtomicUsize,
}

impl Activity {
    /// Reads from the guest so far, or `None` while the caller's reader is waited for: then the
    /// guest has no part in it.
    pub fn reads(&self) -> Option<u64> {
        let idle = self.writing.load(Ordering::Relaxed) == 0;
        idle.then(|| self.reads.load(Ordering::Relaxed))
    }
}

/// The streams of a container's process, not connected yet.
#[derive(Debug)]
pub struct Streams {
    /// What the agent is told.
    pub stdio: Stdio,
    /// What the output streams are about.
    pub activity: Arc<Activity>,
}

impl Streams {
    /// A terminal of this size, or three pipes.
    pub fn new(terminal: Option<WindowSize>) -> Self {
        let stdio = match terminal {
            Some(size) => Stdio::Terminal { stream: StreamToken(0), size },
            None => Stdio::Pipes {
                stdin: Some(StreamToken(0)),
                stdout: Some(StreamToken(1)),
                stderr: Some(StreamToken(2)),
            },
        };
        Self { stdio, activity: Arc::default() }
    }

    /// Connects the streams and begins to copy. Gives the number of streams of which the end will
    /// be reported: those out of the guest.
    ///
    /// # Errors
    /// A connection can't be made, or no thread.
    pub fn connect(&self, broker: &Broker, ended: &Sender<Event>) -> io::Result<usize> {
        match &self.stdio {
            Stdio::Terminal { stream, .. } => {
                let connection = open(broker, *stream)?;
                copy_in(connection.try_clone()?)?;
                self.copy_out(connection, 1, ended)?;
                Ok(1)
            }
            Stdio::Pipes { stdin, stdout, stderr } => {
                if let Some(token) = stdin {
                    copy_in(open(broker, *token)?)?;
                }
                let mut outputs = 0;
                for (token, number) in [(stdout, 1), (stderr, 2)] {
                    if let Some(token) = token {
                        self.copy_out(open(broker, *token)?, number, ended)?;
                        outputs += 1;
                    }
                }
                Ok(outputs)
            }
        }
    }
}

impl Streams {
    /// Starts to copy a stream of the guest to a standard stream; its end is reported.
    fn copy_out(
        &self,
        mut guest: UnixStream,
        number: i32,
        ended: &Sender<Event>,
    ) -> io::Result<()> {
        let mut output = File::from(standard(number)?);
        let (activity, ended) = (Arc::clone(&self.activity), ended.clone());
        let copying = move || {
            copy_out(&mut guest, &mut output, &activity);
            // The monitor is gone if it doesn't listen.
            let _ = ended.blocking_send(Event::StreamEnded);
        };
        thread::Builder::new().name("kiln-stdout".to_owned()).spawn(copying)?;
        Ok(())
    }
}

fn open(broker: &Broker, token: StreamToken) -> io::Result<UnixStream> {
    let mut connection = broker.connect(STREAM_PORT)?;
    connection.write_all(&StreamHeader { token }.to_bytes())?;
    Ok(connection)
}

/// A descriptor of a standard stream of this process.
fn standard(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: standard streams are open for the whole life of the process.
    unsafe { BorrowedFd::borrow_raw(number) }.try_clone_to_owned()
}

/// Copies standard input to the guest until its end, or until the guest takes no more.
fn copy_in(mut guest: UnixStream) -> io::Result<()> {
    let mut input = File::from(standard(0)?);
    let copying = move || {
        let mut buffer = vec![0; BUFFER];
        loop {
            match input.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => {
                    if guest.write_all(&buffer[..length]).is_err() {
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    tracing::debug!(%error, "standard input ends");
                    break;
                }
            }
        }
        // Fails only if the guest has closed the stream.
        let _ = guest.shutdown(Shutdown::Write);
    };
    thread::Builder::new().name("kiln-stdin".to_owned()).spawn(copying)?;
    Ok(())
}

/// Copies a stream of the guest to a descriptor until its end, or until nobody reads.
fn copy_out(guest: &mut UnixStream, output: &mut File, activity: &Activity) {
    let mut buffer = vec![0; BUFFER];
    loop {
        match guest.read(&mut buffer) {
            Ok(0) => return,
            Ok(length) => {
                activity.reads.fetch_add(1, Ordering::Relaxed);
                activity.writing.fetch_add(1, Ordering::Relaxed);
                let written = write_all(output, &buffer[..length]);
                activity.writing.fetch_sub(1, Ordering::Relaxed);
                if let Err(error) = written {
                    tracing::debug!(%error, "an output stream is closed to the step");
                    let _ = guest.shutdown(Shutdown::Both);
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Writes everything, also to a descriptor that somebody else has made non-blocking.
fn write_all(output: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

    while !bytes.is_empty() {
        match output.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(length) => bytes = &bytes[length..],
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut waited = [PollFd::new(output.as_fd(), PollFlags::POLLOUT)];
                poll(&mut waited, PollTimeout::NONE)?;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
