//! Copies between vsock streams and the caller's own standard streams.
//!
//! Each direction is a thread with blocking calls and one buffer: the caller's descriptors are
//! shared with other processes, so they can't be made non-blocking, and a thread that waits for a
//! slow reader holds back nothing but its own stream, which holds back the guest's writer.
//!
//! A reader of standard output that goes away is to the step what it is to a local process: the
//! stream is closed towards the guest, and the step gets `SIGPIPE` when it writes again. Likewise once
//! more has come than the step may write; what it may has been written on by then.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use kiln_protocol::{STREAM_PORT, Stdio, StreamHeader, StreamToken, WindowSize};
use tokio::sync::mpsc::Sender;

use super::broker::Broker;
use super::budget::Budget;
use super::deadline::Deadline;
use super::events::Event;

/// What is moved at once: as much as a vsock packet holds, several times.
const BUFFER: usize = 256 << 10;

/// What the output streams of a process are about, for whoever waits for their end, and how much they
/// may carry.
#[derive(Debug, Default)]
pub struct Activity {
    /// What they count against, if there is a limit.
    budget: Option<Arc<Budget>>,
    /// Reads from the guest so far.
    reads: AtomicU64,
    /// Streams that wait for the caller's reader.
    writing: AtomicUsize,
}

impl Activity {
    /// Streams that count against this.
    pub fn limited(budget: Option<Arc<Budget>>) -> Self {
        Self { budget, ..Self::default() }
    }

    /// Counts bytes from the guest; gives how many of them are within the limit.
    fn admit(&self, length: usize) -> usize {
        self.budget.as_ref().map_or(length, |budget| budget.admit(length))
    }

    /// Reads from the guest so far, or `None` while the caller's reader is waited for: then the
    /// guest has no part in it.
    fn reads(&self) -> Option<u64> {
        let idle = self.writing.load(Ordering::Relaxed) == 0;
        idle.then(|| self.reads.load(Ordering::Relaxed))
    }
}

/// How long the guest may keep quiet with an output stream open, once the process has ended.
pub const QUIET: Duration = Duration::from_secs(10);

/// Waits for the end of output streams of a process that has ended, each [`QUIET`] anew. Of one that
/// somebody wants to be over, [`QUIET`] at most, whoever is waited for.
#[derive(Debug)]
pub struct Drain<'a> {
    activity: &'a Activity,
    before: Option<u64>,
    quiet: Deadline,
    /// What is left once it is to be over.
    rest: Option<Deadline>,
}

impl<'a> Drain<'a> {
    /// Begins to wait.
    pub fn new(activity: &'a Activity) -> Self {
        Self { activity, before: None, quiet: Deadline::after(QUIET), rest: None }
    }

    /// It is to be over: also a caller that does not read is waited for no longer than [`QUIET`] from
    /// now on.
    pub fn hurry(&mut self) {
        self.rest.get_or_insert_with(|| Deadline::after(QUIET));
    }

    /// How long the next wait may take.
    pub fn deadline(&mut self) -> &mut Deadline {
        match &mut self.rest {
            Some(rest) => rest,
            None => {
                self.quiet = Deadline::after(QUIET);
                &mut self.quiet
            }
        }
    }

    /// The [deadline](Self::deadline) has passed: whether nothing more is waited for. That is so once
    /// it is to be over, or if the guest has kept quiet for all of the time: then it keeps a stream
    /// open without a word.
    pub fn is_stuck(&mut self) -> bool {
        if self.rest.is_some() {
            return true;
        }
        let reads = self.activity.reads();
        let stuck = reads.is_some() && reads == self.before;
        self.before = reads;
        stuck
    }
}

/// Names for streams: none is given twice in a sandbox's life.
#[derive(Debug, Default)]
pub struct Tokens {
    next: u64,
}

impl From<u64> for Tokens {
    /// Those from a number on.
    fn from(next: u64) -> Self {
        Self { next }
    }
}

impl Tokens {
    fn next(&mut self) -> StreamToken {
        let token = StreamToken(self.next);
        // A sandbox that has an exec every microsecond needs 200 000 years to come round.
        self.next = self.next.wrapping_add(1);
        token
    }

    /// Streams for a process with a terminal of this size, or with three pipes.
    pub fn stdio(&mut self, terminal: Option<WindowSize>) -> Stdio {
        match terminal {
            Some(size) => Stdio::Terminal { stream: self.next(), size },
            None => Stdio::Pipes {
                stdin: Some(self.next()),
                stdout: Some(self.next()),
                stderr: Some(self.next()),
            },
        }
    }
}

/// The connected streams of a process.
#[derive(Debug)]
pub enum Streams {
    /// A terminal's, both ways.
    Terminal(UnixStream),
    /// Standard input, output and error.
    Pipes([UnixStream; 3]),
}

impl Streams {
    /// Connects a process's streams, as [`Tokens::stdio`] has named them.
    ///
    /// # Errors
    /// A connection can't be made.
    pub fn connect(broker: &Broker, stdio: &Stdio) -> io::Result<Self> {
        match stdio {
            Stdio::Terminal { stream, .. } => Ok(Self::Terminal(open(broker, *stream)?)),
            Stdio::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr: Some(stderr) } => {
                let [stdin, stdout, stderr] =
                    [stdin, stdout, stderr].map(|token| open(broker, *token));
                Ok(Self::Pipes([stdin?, stdout?, stderr?]))
            }
            Stdio::Pipes { .. } => Err(io::Error::other("a stream has no name")),
        }
    }

    /// For another process to relay.
    pub fn into_descriptors(self) -> Vec<OwnedFd> {
        match self {
            Self::Terminal(stream) => vec![stream.into()],
            Self::Pipes(streams) => streams.map(OwnedFd::from).into(),
        }
    }

    /// What [`into_descriptors`](Self::into_descriptors) gave.
    ///
    /// # Errors
    /// Not as many as there are.
    pub fn from_descriptors(descriptors: Vec<OwnedFd>) -> io::Result<Self> {
        match <[OwnedFd; 3]>::try_from(descriptors) {
            Ok(streams) => Ok(Self::Pipes(streams.map(UnixStream::from))),
            Err(descriptors) => match <[OwnedFd; 1]>::try_from(descriptors) {
                Ok([stream]) => Ok(Self::Terminal(stream.into())),
                Err(_) => Err(io::Error::other("neither a terminal's stream nor three")),
            },
        }
    }

    /// Begins to copy. Gives the number of streams of which the end will be reported: those out of
    /// the guest.
    ///
    /// # Errors
    /// No threads or descriptors are left.
    pub fn relay(self, activity: &Arc<Activity>, ended: &Sender<Event>) -> io::Result<usize> {
        match self {
            Self::Terminal(stream) => {
                copy_in(stream.try_clone()?)?;
                start_copy_out(stream, 1, activity, ended)?;
                Ok(1)
            }
            Self::Pipes([stdin, stdout, stderr]) => {
                copy_in(stdin)?;
                start_copy_out(stdout, 1, activity, ended)?;
                start_copy_out(stderr, 2, activity, ended)?;
                Ok(2)
            }
        }
    }
}

/// Starts to copy a stream of the guest to a standard stream; its end is reported.
fn start_copy_out(
    mut guest: UnixStream,
    number: i32,
    activity: &Arc<Activity>,
    ended: &Sender<Event>,
) -> io::Result<()> {
    let mut output = File::from(standard(number)?);
    let (activity, ended) = (Arc::clone(activity), ended.clone());
    let copying = move || {
        // Who listens no more has no use for either.
        if copy_out(&mut guest, &mut output, &activity) == CopyEnd::Exceeded {
            let _ = ended.blocking_send(Event::OutputExceeded);
        }
        let _ = ended.blocking_send(Event::StreamEnded);
    };
    thread::Builder::new().name("kiln-stdout".to_owned()).spawn(copying)?;
    Ok(())
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

/// Why nothing more is copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyEnd {
    /// The guest has ended the stream, or nobody reads.
    Ended,
    /// More has come than the limit allows.
    Exceeded,
}

/// Copies a stream of the guest to a descriptor until its end, or until nobody reads, or no more may
/// be read.
fn copy_out(guest: &mut UnixStream, output: &mut File, activity: &Activity) -> CopyEnd {
    let mut buffer = vec![0; BUFFER];
    loop {
        match guest.read(&mut buffer) {
            Ok(0) => return CopyEnd::Ended,
            Ok(length) => {
                activity.reads.fetch_add(1, Ordering::Relaxed);
                let admitted = activity.admit(length);
                activity.writing.fetch_add(1, Ordering::Relaxed);
                let written = write_all(output, &buffer[..admitted]);
                activity.writing.fetch_sub(1, Ordering::Relaxed);
                if let Err(error) = written {
                    tracing::debug!(%error, "an output stream is closed to the step");
                    let _ = guest.shutdown(Shutdown::Both);
                    return CopyEnd::Ended;
                }
                if admitted < length {
                    let _ = guest.shutdown(Shutdown::Both);
                    return CopyEnd::Exceeded;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return CopyEnd::Ended,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What is copied of `sent`, and why no more.
    fn copied(sent: &[u8], activity: &Activity) -> (Vec<u8>, CopyEnd) {
        let (mut guest, mut host) = UnixStream::pair().expect("sockets");
        let (mut reader, writer) = io::pipe().expect("pipe");
        guest.write_all(sent).expect("room");
        drop(guest);
        let end = copy_out(&mut host, &mut File::from(OwnedFd::from(writer)), activity);
        let mut bytes = Vec::new();
        reader.read_to_end(&mut bytes).expect("read");
        (bytes, end)
    }

    #[test]
    fn streams_share_a_limit_and_what_is_within_arrives() {
        let limited = |limit: &str| {
            let budget = Budget::new(limit.parse().expect("bytes")).expect("a budget");
            Activity::limited(Some(Arc::new(budget)))
        };
        let activity = limited("10");
        assert_eq!(copied(b"123456", &activity), (b"123456".to_vec(), CopyEnd::Ended));
        assert_eq!(copied(b"7890", &activity), (b"7890".to_vec(), CopyEnd::Ended));
        assert_eq!(copied(b"x", &activity), (Vec::new(), CopyEnd::Exceeded));
        let activity = limited("3");
        assert_eq!(copied(b"12345", &activity), (b"123".to_vec(), CopyEnd::Exceeded));
    }

    #[test]
    fn a_reader_is_waited_for_until_it_is_to_be_over() {
        let activity = Activity::default();
        let mut drain = Drain::new(&activity);
        activity.writing.fetch_add(1, Ordering::Relaxed);
        for _ in 0..3 {
            assert!(!drain.is_stuck());
        }
        drain.hurry();
        assert!(drain.is_stuck());
    }

    #[test]
    fn streams_without_a_limit_end_with_the_guest() {
        assert_eq!(copied(b"12345", &Activity::default()), (b"12345".to_vec(), CopyEnd::Ended));
    }
}
