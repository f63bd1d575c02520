//! A stream connection over virtio-vsock (virtio 1.2, section 5.10): packets and credit.

use core::mem::offset_of;

use crate::virtio::queue::{Buffer, Queue, Ring};
use crate::virtio::{Device, Error, Window};

/// Packet operations.
pub mod op {
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// `SHUTDOWN`'s flags: its sender receives no more.
const NO_MORE_RECEIVED: u32 = 1;
/// Its sender sends no more.
pub const NO_MORE_SENT: u32 = 2;
/// Both.
pub const BOTH_SIDES: u32 = NO_MORE_RECEIVED | NO_MORE_SENT;

const HOST_CID: u64 = 2;
const STREAM: u16 = 1;
/// What the guest grants the host.
const WINDOW: u32 = 8192;
/// The most that a packet carries, each way.
pub const MAX_PAYLOAD: usize = 4096;
const RECEIVE_BUFFERS: usize = 8;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;

#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Header {
    source_cid: u64,
    destination_cid: u64,
    source_port: u32,
    destination_port: u32,
    length: u32,
    kind: u16,
    op: u16,
    flags: u32,
    buffer_size: u32,
    forwarded: u32,
}

#[repr(C)]
struct Frame {
    header: Header,
    payload: [u8; MAX_PAYLOAD],
}

const EMPTY: Frame = Frame {
    header: Header {
        source_cid: 0,
        destination_cid: 0,
        source_port: 0,
        destination_port: 0,
        length: 0,
        kind: 0,
        op: 0,
        flags: 0,
        buffer_size: 0,
        forwarded: 0,
    },
    payload: [0; MAX_PAYLOAD],
};

static mut RINGS: [Ring; 3] = [const { Ring::new() }; 3];
static mut RECEIVED: [Frame; RECEIVE_BUFFERS] = [EMPTY; RECEIVE_BUFFERS];
static mut SENT: Frame = EMPTY;

/// A packet from the host.
#[derive(Clone, Copy)]
pub struct Packet {
    pub op: u16,
    pub flags: u32,
    pub local_port: u32,
    pub peer_port: u32,
    buffer_size: u32,
    forwarded: u32,
    length: usize,
    payload: [u8; MAX_PAYLOAD],
}

impl Packet {
    pub fn payload(&self) -> &[u8] {
        &self.payload[..self.length]
    }
}

/// The device, with one connection at a time.
pub struct Socket {
    device: Device,
    receive: Queue,
    transmit: Queue,
    cid: u64,
    /// Data that came while only credit was wanted.
    kept: [Option<Packet>; 2],
}

impl Socket {
    pub fn open(window: Window) -> Result<Self, Error> {
        let device = Device::open(window, 0)?;
        // SAFETY: this is the only use of the rings, once.
        let [receive, transmit, event] = unsafe { &mut *(&raw mut RINGS) };
        let mut receive = device.add_queue(RX, receive)?;
        let transmit = device.add_queue(TX, transmit)?;
        device.add_queue(EVENT, event)?;
        for buffer in 0..RECEIVE_BUFFERS {
            offer(&mut receive, buffer);
        }
        device.begin()?;
        device.notify(RX);
        let cid = device.config64(0);
        Ok(Self { device, receive, transmit, cid, kept: [None; 2] })
    }

    /// Sends a packet and waits until the device has taken it.
    pub fn send(
        &mut self,
        connection: &Connection,
        op: u16,
        flags: u32,
        payload: &[u8],
    ) -> Result<(), &'static str> {
        let header = Header {
            source_cid: self.cid,
            destination_cid: HOST_CID,
            source_port: connection.local_port,
            destination_port: connection.peer_port,
            length: payload.len() as u32,
            kind: STREAM,
            op,
            flags,
            buffer_size: WINDOW,
            forwarded: connection.granted_from,
        };
        let frame = &raw mut SENT;
        // SAFETY: the device has taken what was sent before.
        let [header, payload] = unsafe {
            (&raw mut (*frame).header).write_volatile(header);
            let to = (&raw mut (*frame).payload).cast::<u8>();
            to.copy_from_nonoverlapping(payload.as_ptr(), payload.len());
            [
                Buffer::read_by_device(frame, size_of::<Header>()),
                Buffer::read_by_device(to, payload.len()),
            ]
        };
        let chain = [header, payload];
        self.transmit.offer(0, if op == op::RW { &chain } else { &chain[..1] });
        self.device.notify(TX);
        while self.transmit.take_used().is_none() {
            self.device.wait().map_err(|_| "the device does not send")?;
        }
        Ok(())
    }

    /// The next packet, if one is there.
    pub fn poll(&mut self) -> Option<Packet> {
        if let Some(packet) = self.kept[0].take() {
            self.kept.swap(0, 1);
            return Some(packet);
        }
        self.poll_device()
    }

    /// Waits for the next packet.
    pub fn receive(&mut self) -> Result<Packet, &'static str> {
        loop {
            match self.poll() {
                Some(packet) => return Ok(packet),
                None => self.device.wait().map_err(|_| "the host does not answer")?,
            }
        }
    }

    /// Waits for the next packet without data, and keeps the data that comes before it.
    pub fn receive_credit(&mut self) -> Result<Packet, &'static str> {
        loop {
            match self.poll_device() {
                Some(packet) if packet.op != op::RW => return Ok(packet),
                Some(packet) => {
                    let place = self.kept.iter_mut().find(|kept| kept.is_none());
                    *place.ok_or("the host sent more than it was granted")? = Some(packet);
                }
                None => self.device.wait().map_err(|_| "the host gives no credit")?,
            }
        }
    }

    fn poll_device(&mut self) -> Option<Packet> {
        let (buffer, written) = self.receive.take_used()?;
        let buffer = usize::from(buffer) % RECEIVE_BUFFERS;
        // SAFETY: the device has used the buffer.
        let (header, payload) = unsafe {
            let frame = &raw const RECEIVED[buffer];
            ((&raw const (*frame).header).read(), (&raw const (*frame).payload).read())
        };
        let most = (written as usize).saturating_sub(offset_of!(Frame, payload));
        offer(&mut self.receive, buffer);
        self.device.notify(RX);
        Some(Packet {
            op: header.op,
            flags: header.flags,
            local_port: header.destination_port,
            peer_port: header.source_port,
            buffer_size: header.buffer_size,
            forwarded: header.forwarded,
            length: (header.length as usize).min(most).min(MAX_PAYLOAD),
            payload,
        })
    }
}

fn offer(queue: &mut Queue, buffer: usize) {
    // SAFETY: the buffer is the driver's until it is offered.
    let frame = unsafe { &raw mut RECEIVED[buffer] };
    queue.offer(buffer as u16, &[Buffer::written_by_device(frame, size_of::<Frame>())]);
}

/// The two counts of credit of a connection.
pub struct Connection {
    pub local_port: u32,
    pub peer_port: u32,
    sent: u32,
    peer_buffer_size: u32,
    peer_forwarded: u32,
    received: u32,
    granted_from: u32,
}

impl Connection {
    pub fn new(local_port: u32, peer_port: u32) -> Self {
        Self {
            local_port,
            peer_port,
            sent: 0,
            peer_buffer_size: 0,
            peer_forwarded: 0,
            received: 0,
            granted_from: 0,
        }
    }

    /// How much the host takes at this time.
    pub fn credit(&self) -> u64 {
        let under_way = self.sent.wrapping_sub(self.peer_forwarded);
        self.peer_buffer_size.saturating_sub(under_way).into()
    }

    pub fn sent(&mut self, bytes: u64) {
        self.sent = self.sent.wrapping_add(bytes as u32);
    }

    /// Every packet says what its sender takes.
    pub fn note_credit(&mut self, packet: &Packet) {
        self.peer_buffer_size = packet.buffer_size;
        self.peer_forwarded = packet.forwarded;
    }

    /// Counts received bytes. Whether the host was granted them.
    pub fn received(&mut self, bytes: u64) -> bool {
        self.received = self.received.wrapping_add(bytes as u32);
        self.received.wrapping_sub(self.granted_from) <= WINDOW
    }

    /// Whether less than a quarter of what the host was granted is left.
    pub fn little_granted(&self) -> bool {
        self.received.wrapping_sub(self.granted_from) > WINDOW / 4 * 3
    }

    /// Grants a whole window again.
    pub fn grant(&mut self) {
        self.granted_from = self.received;
    }
}
