//! virtio-console (virtio 1.2, section 5.3): one port between a pair of the host's file descriptors
//! and the guest's `hvc0`.
//!
//! Neither side is waited for: input is read only as far as the guest has given buffers for it, and
//! a buffer of the guest's output stays in its queue until the host's end takes it. So a reader that
//! stalls stalls the console, and memory for it is the guest's own.
//!
//! The file descriptors may be anything: pipes, terminals, files. Their own blocking mode is left
//! as it is, for it may be shared with other processes; they are asked before each transfer whether
//! it would block.

mod watch;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use virtio_queue::{Queue, QueueOwnedT, QueueT};

use self::watch::{Interest, Watch};
use super::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};
use crate::GuestMemory;

const DEVICE_TYPE: u32 = 3;
/// The configuration has the console's size.
const FEATURE_SIZE: u64 = 1 << 0;
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const QUEUE_SIZES: [u16; 2] = [64, 64];

/// What is moved at once: a pipe that is ready to be written takes as much without blocking.
const CHUNK: usize = 4096;

/// How many columns and rows a console has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub columns: u16,
    /// Rows.
    pub rows: u16,
}

/// A console.
#[derive(Debug)]
pub struct Console {
    epoll: OwnedFd,
    input: Option<Watch>,
    output: Option<Watch>,
    size: Option<Size>,
    /// How much of the first buffer in the transmit queue was written out already.
    written: usize,
}

impl Console {
    /// A console whose guest reads `input` and writes `output`; without an output what it writes is
    /// thrown away.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
        size: Option<Size>,
    ) -> io::Result<Self> {
        Ok(Self {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
            input: input.map(|fd| Watch::new(fd, Interest::Readable)),
            output: output.map(|fd| Watch::new(fd, Interest::Writable)),
            size,
            written: 0,
        })
    }

    /// Moves input to the guest as long as there are both input and buffers.
    fn receive(&mut self, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, DeviceError> {
        let broken = |e: virtio_queue::Error| queue_error(RECEIVE, &e);
        let mut used = false;
        while let Some(input) = &mut self.input {
            if !is_ready(input.fd(), PollFlags::IN)? {
                // Only worth waiting for while there is a buffer for it.
                let wanted = queue.enable_notification(memory).map_err(broken)?;
                input.watch(self.epoll.as_fd(), wanted)?;
                break;
            }
            let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
                if queue.enable_notification(memory).map_err(broken)? {
                    continue;
                }
                input.watch(self.epoll.as_fd(), false)?;
                break;
            };
            let head = chain.head_index();
            let mut writer = chain.writer(memory).map_err(broken)?;
            let mut bytes = [0; CHUNK];
            let room = writer.available_bytes().min(CHUNK);
            let count = if room == 0 { 0 } else { read_some(input.fd(), &mut bytes[..room]) };
            if room > 0 && count == 0 {
                queue.go_to_previous_position();
                input.watch(self.epoll.as_fd(), false)?;
                self.input = None;
                break;
            }
            writer.write_all(&bytes[..count]).map_err(|e| queue_error(RECEIVE, &e))?;
            queue.add_used(memory, head, count as u32).map_err(broken)?;
            used = true;
        }
        Ok(used)
    }

    /// Moves the guest's output out as far as the host takes it.
    fn transmit(&mut self, memory: &GuestMemory, queue: &mut Queue) -> Result<bool, DeviceError> {
        let broken = |e: virtio_queue::Error| queue_error(TRANSMIT, &e);
        let mut used = false;
        loop {
            let Some(chain) = queue.iter(memory).map_err(broken)?.next() else {
                if queue.enable_notification(memory).map_err(broken)? {
                    continue;
                }
                if let Some(output) = &mut self.output {
                    output.watch(self.epoll.as_fd(), false)?;
                }
                return Ok(used);
            };
            let head = chain.head_index();
            let mut reader = chain.reader(memory).map_err(broken)?;
            let length = reader.available_bytes();
            if self.output.is_some() && self.written < length {
                let mut rest = reader.split_at(self.written).map_err(broken)?;
                let mut bytes = [0; CHUNK];
                let count = rest.read(&mut bytes).map_err(|e| queue_error(TRANSMIT, &e))?;
                let taken = self.write_some(&bytes[..count])?;
                self.written += taken;
                let done = self.output.is_none() || self.written >= length;
                if !done {
                    queue.go_to_previous_position();
                    if taken == 0 {
                        return Ok(used);
                    }
                    continue;
                }
            }
            self.written = 0;
            queue.add_used(memory, head, 0).map_err(broken)?;
            used = true;
        }
    }

    /// Writes what the host takes now. An output that fails is given up.
    fn write_some(&mut self, bytes: &[u8]) -> Result<usize, DeviceError> {
        let Some(output) = &mut self.output else { return Ok(0) };
        if !is_ready(output.fd(), PollFlags::OUT)? {
            output.watch(self.epoll.as_fd(), true)?;
            return Ok(0);
        }
        match rustix::io::write(output.fd(), bytes) {
            Ok(count) => Ok(count),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {
                output.watch(self.epoll.as_fd(), true)?;
                Ok(0)
            }
            Err(e) => {
                tracing::warn!("virtio console: its output cannot be written any more: {e}");
                output.watch(self.epoll.as_fd(), false)?;
                self.output = None;
                Ok(0)
            }
        }
    }
}

/// Whether a transfer would not block now.
fn is_ready(fd: BorrowedFd<'_>, events: PollFlags) -> Result<bool, DeviceError> {
    const NOW: Timespec = Timespec { tv_sec: 0, tv_nsec: 0 };

    let mut fds = [PollFd::from_borrowed_fd(fd, events)];
    match poll(&mut fds, Some(&NOW)) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(DeviceError::Host { what: "poll the console", source: e.into() }),
    }
}

/// Reads what is there; nothing means that there will never be more.
fn read_some(fd: BorrowedFd<'_>, bytes: &mut [u8]) -> usize {
    loop {
        match rustix::io::read(fd, &mut *bytes) {
            Ok(count) => return count,
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                tracing::warn!("virtio console: its input cannot be read any more: {e}");
                return 0;
            }
        }
    }
}

fn queue_error(queue: u16, error: &dyn std::error::Error) -> DeviceError {
    DeviceError::Queue { queue, reason: error.to_string() }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        if self.size.is_some() { FEATURE_SIZE } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let Size { columns, rows } = self.size.unwrap_or(Size { columns: 0, rows: 0 });
        let (columns, rows) = (columns.to_le_bytes(), rows.to_le_bytes());
        read_config_bytes(&[columns[0], columns[1], rows[0], rows[1]], offset, data);
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.epoll.as_fd())
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let mut used = Used::NONE;
        let [receive, transmit, ..] = &mut *queues.queues else {
            return Ok(used);
        };
        if event != Event::Queue(TRANSMIT) && receive.ready() {
            let any = self.receive(queues.memory, receive)?;
            if any {
                used.add(RECEIVE);
            }
        }
        if event != Event::Queue(RECEIVE) && transmit.ready() {
            let any = self.transmit(queues.memory, transmit)?;
            if any {
                used.add(TRANSMIT);
            }
        }
        Ok(used)
    }

    fn reset(&mut self) {
        self.written = 0;
        for watch in [&mut self.input, &mut self.output].into_iter().flatten() {
            if let Err(e) = watch.watch(self.epoll.as_fd(), false) {
                tracing::warn!("virtio console: {e}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
