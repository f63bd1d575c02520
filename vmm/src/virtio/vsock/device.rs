//! The device: its queues and its life.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};

use super::mux::Mux;
use super::packet::{HEADER_SIZE, Header};
use crate::GuestMemory;
use crate::virtio::buffers::Buffers;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// The queues' numbers. The event queue is there and never used: it is for migration.
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;

const QUEUE_SIZES: [u16; 3] = [256, 256, 16];

/// `VIRTIO_VSOCK_F_STREAM`
const FEATURE_STREAM: u64 = 1 << 0;

/// Most packets of one direction that are handled in a row, so that a busy guest does not keep the
/// device's thread from whatever else it serves.
const BUDGET: usize = 1024;

/// The smallest context id of a guest.
const FIRST_GUEST_CID: u64 = 3;

/// Why a vsock device can't be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// The context id is one of the reserved ones or has more than 32 bits.
    #[error("guest_cid {0} is reserved: use one from 3 to 4294967294")]
    Cid(u64),
    /// An operating system resource.
    #[error("can't watch the broker socket")]
    Host(#[source] io::Error),
}

/// A virtio-vsock device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    mux: Mux,
}

/// How the handling of a queue stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// Nothing is left to do; the driver rings when that changes.
    Done,
    /// There is more, but the budget is used up.
    Budget,
    /// Answers have to be taken by the guest first.
    NoRoom,
}

impl Vsock {
    /// A device for the guest `guest_cid`, whose connections pass through the device's end of a
    /// [broker](super::broker) socket. The guest may connect to each of `host_ports` once in the
    /// device's life.
    ///
    /// # Errors
    /// A context id that no guest may have; an epoll instance that can't be made.
    pub fn new(guest_cid: u64, host_ports: &[u32], broker: OwnedFd) -> Result<Self, NewError> {
        if !(FIRST_GUEST_CID..u64::from(u32::MAX)).contains(&guest_cid) {
            return Err(NewError::Cid(guest_cid));
        }
        let mux =
            Mux::new(guest_cid, host_ports.iter().copied(), broker).map_err(NewError::Host)?;
        Ok(Self { guest_cid, mux })
    }

    /// Takes packets from the guest.
    fn take(&mut self, memory: &GuestMemory, queue: &mut Queue) -> Result<(bool, Stop), String> {
        let mut used = false;
        let mut left = BUDGET;
        queue.disable_notification(memory).map_err(text)?;
        loop {
            if !self.mux.has_room() {
                return Ok((used, Stop::NoRoom));
            }
            if left == 0 {
                return Ok((used, Stop::Budget));
            }
            let Some(chain) = next_chain(queue, memory)? else {
                return Ok((used, Stop::Done));
            };
            left -= 1;
            let head = chain.head_index();
            let mut packet = Buffers::collect(memory, chain).map_err(text)?.readable;
            let mut header = [0; HEADER_SIZE];
            if packet.read(&mut header) == HEADER_SIZE {
                self.mux.receive(&Header::from_bytes(&header), packet);
            } else {
                tracing::debug!("packet without a whole header dropped");
            }
            queue.add_used(memory, head, 0).map_err(text)?;
            used = true;
        }
    }

    /// Gives packets to the guest.
    fn give(&mut self, memory: &GuestMemory, queue: &mut Queue) -> Result<(bool, Stop), String> {
        let mut used = false;
        let mut left = BUDGET;
        queue.disable_notification(memory).map_err(text)?;
        while self.mux.wants_to_transmit() {
            if left == 0 {
                return Ok((used, Stop::Budget));
            }
            let Some(chain) = next_chain(queue, memory)? else {
                return Ok((used, Stop::Done));
            };
            left -= 1;
            let head = chain.head_index();
            let mut room = Buffers::collect(memory, chain).map_err(text)?.writable;
            let mut start = room.take_front(HEADER_SIZE);
            let mut written = 0;
            if room.is_empty() {
                tracing::debug!("receive buffer without room for data dropped");
            } else if let Some(header) = self.mux.transmit(&mut room) {
                start.write(&header.to_bytes());
                written = HEADER_SIZE as u32 + header.len;
            } else {
                queue.go_to_previous_position();
                break;
            }
            queue.add_used(memory, head, written).map_err(text)?;
            used = true;
        }
        Ok((used, Stop::Done))
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURE_STREAM
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn host_events(&self) -> Option<BorrowedFd<'_>> {
        Some(self.mux.host_events())
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        if event == Event::Host {
            let polled = self.mux.poll_host();
            polled.map_err(|source| DeviceError::Host { what: "epoll_wait failed", source })?;
        }
        let mut used = Used::NONE;
        let [receive, transmit, ..] = &mut *queues.queues else {
            return Ok(used);
        };
        // Between the driver's reset and its return nobody takes packets: only what the guest left
        // behind is passed on, which polling has done.
        if !receive.ready() || !transmit.ready() {
            return Ok(used);
        }
        self.mux.take_from_broker();
        loop {
            let taken = self.take(queues.memory, transmit);
            let (any, taking) =
                taken.map_err(|reason| DeviceError::Queue { queue: TRANSMIT, reason })?;
            if any {
                used.add(TRANSMIT);
            }
            let given = self.give(queues.memory, receive);
            let (any, giving) =
                given.map_err(|reason| DeviceError::Queue { queue: RECEIVE, reason })?;
            if any {
                used.add(RECEIVE);
            }
            if taking == Stop::Budget || giving == Stop::Budget {
                self.mux.wake();
                return Ok(used);
            }
            if taking == Stop::Done || !self.mux.has_room() {
                return Ok(used);
            }
        }
    }

    fn reset(&mut self) {
        self.mux.reset();
    }
}

/// The next chain of a queue whose notifications are off; if there is none they are on again.
fn next_chain<'m>(
    queue: &mut Queue,
    memory: &'m GuestMemory,
) -> Result<Option<DescriptorChain<&'m GuestMemory>>, String> {
    loop {
        if let Some(chain) = queue.iter(memory).map_err(text)?.next() {
            return Ok(Some(chain));
        }
        if !queue.enable_notification(memory).map_err(text)? {
            return Ok(None);
        }
        // One came in between.
        queue.disable_notification(memory).map_err(text)?;
    }
}

fn text(error: impl std::fmt::Display) -> String {
    error.to_string()
}
