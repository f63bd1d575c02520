//! The connection to the guest's agent.
//!
//! The process that serves the guest's vsock device has made it, and may have kept what it handed over:
//! the same open file, whose mode it can change at any time. So nothing here relies on that the file
//! doesn't block. Each call says by itself that it won't wait.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use nix::sys::socket::{MsgFlags, recv, send};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::readable;

/// One of any number of hands on the connection.
#[derive(Debug, Clone)]
pub struct AgentStream(Rc<AsyncFd<OwnedFd>>);

impl AgentStream {
    /// Takes a connection. Must be called within the runtime.
    ///
    /// # Errors
    /// The runtime can't watch it.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        Ok(Self(Rc::new(readable::register_for(stream.into(), interest)?)))
    }

    /// Reads what has come, once something has; 0 at the end.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let receive =
            |stream: &OwnedFd| Ok(recv(stream.as_raw_fd(), &mut *buffer, MsgFlags::MSG_DONTWAIT)?);
        self.0.async_io(Interest::READABLE, receive).await
    }

    /// Writes all bytes, as fast as the other end takes them.
    ///
    /// # Errors
    /// As send(2).
    pub async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        while !bytes.is_empty() {
            let give = |stream: &OwnedFd| Ok(send(stream.as_raw_fd(), bytes, flags)?);
            let given = self.0.async_io(Interest::WRITABLE, give).await?;
            bytes = &bytes[given..];
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::time::Duration;

    use super::*;

    fn in_runtime(test: impl Future<Output = ()>) {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        builder.enable_all().build().expect("runtime").block_on(test);
    }

    #[test]
    fn whoever_has_the_same_open_file_cannot_make_it_wait() {
        in_runtime(async {
            let (ours, mut theirs) = UnixStream::pair().expect("pair");
            let kept = ours.try_clone().expect("copy");
            let stream = AgentStream::new(ours).expect("watched");
            kept.set_nonblocking(false).expect("set");
            theirs.write_all(&[7; 16]).expect("written");
            let mut buffer = [0; 16];
            // A read that fills the buffer may be followed by one that finds nothing.
            assert_eq!(stream.read(&mut buffer).await.expect("read"), 16);
            let second = tokio::time::timeout(Duration::from_millis(50), stream.read(&mut buffer));
            assert!(second.await.is_err(), "nothing has come");
            theirs.write_all(&[8]).expect("written");
            assert_eq!(stream.read(&mut buffer).await.expect("read"), 1);
            assert_eq!(buffer[0], 8);
        });
    }

    #[test]
    fn more_than_fits_is_written_as_it_is_read() {
        in_runtime(async {
            let (ours, mut theirs) = UnixStream::pair().expect("pair");
            let stream = AgentStream::new(ours).expect("watched");
            let reader = std::thread::spawn(move || {
                let mut read = Vec::new();
                theirs.read_to_end(&mut read).expect("read");
                read
            });
            let bytes: Vec<u8> = (0..1_000_000u32).map(|number| number as u8).collect();
            stream.write_all(&bytes).await.expect("written");
            drop(stream);
            assert!(reader.join().expect("read") == bytes);
        });
    }
}
