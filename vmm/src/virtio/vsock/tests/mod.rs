//! The device against a guest that the tests play: packets in, packets out.

mod device;
mod model;
mod protocol;

use std::os::unix::net::UnixStream;

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes as _, GuestAddress};

use super::broker::Broker;
use super::mux::Mux;
use super::packet::{HOST_CID, Header, Op, TYPE_STREAM};
use crate::GuestMemory;
use crate::virtio::buffers::{Buffers, Bytes};

const CID: u64 = 3;

/// Where the harness puts what the guest sends, and what it is sent.
const OUTGOING: u64 = 0;
const INCOMING: u64 = 1 << 20;
const MEMORY: usize = 2 << 20;

/// Room for data in each receive buffer, as Linux has it.
const ROOM: u32 = 3732;

/// A mux, and both its neighbours: the monitor and the guest.
struct Harness {
    mux: Mux,
    monitor: Broker,
    memory: GuestMemory,
}

/// A packet as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Packet {
    header: Header,
    data: Vec<u8>,
}

impl Packet {
    fn op(&self) -> Option<Op> {
        Op::from_number(self.header.op)
    }
}

/// A packet of the guest to a host port, with credit enough.
fn header(op: Op, guest_port: u32, host_port: u32) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: 1 << 20,
        ..Header::default()
    }
}

impl Harness {
    fn new(host_ports: &[u32]) -> Self {
        let (monitor, device) = Broker::pair().expect("broker");
        let mux = Mux::new(CID, host_ports.iter().copied(), device).expect("mux");
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        Self { mux, monitor, memory }
    }

    /// Sends a packet, the header's length being that of the data.
    fn send(&mut self, header: Header, data: &[u8]) {
        self.send_raw(Header { len: data.len() as u32, ..header }, data);
    }

    fn send_raw(&mut self, header: Header, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(OUTGOING)).expect("in memory");
        // Cut in two, as a driver may.
        let cut = data.len() as u32 / 3;
        let rest = data.len() as u32 - cut;
        let pieces = [
            Descriptor::new(OUTGOING, cut, 0, 0),
            Descriptor::new(OUTGOING + u64::from(cut), rest, 0, 0),
        ];
        let payload = Buffers::collect(&self.memory, pieces.into_iter()).expect("valid").readable;
        self.mux.receive(&header, payload);
    }

    /// Lets the device see what has happened on the host.
    fn poll(&mut self) {
        self.mux.poll_host().expect("polls");
        self.mux.take_from_broker();
    }

    /// The next packet for the guest.
    fn next(&mut self) -> Option<Packet> {
        self.poll();
        self.next_without_polling(ROOM)
    }

    fn next_without_polling(&mut self, room: u32) -> Option<Packet> {
        let piece = Descriptor::new(INCOMING, room, 2, 0);
        let mut room: Bytes<'_> =
            Buffers::collect(&self.memory, [piece].into_iter()).expect("valid").writable;
        let header = self.mux.transmit(&mut room)?;
        let mut data = vec![0; header.len as usize];
        self.memory.read_slice(&mut data, GuestAddress(INCOMING)).expect("in memory");
        Some(Packet { header, data })
    }

    /// All packets for the guest.
    fn all(&mut self) -> Vec<Packet> {
        std::iter::from_fn(|| self.next()).collect()
    }

    /// The only packet for the guest.
    fn only(&mut self) -> Packet {
        let mut packets = self.all();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets.remove(0)
    }

    /// A connection from the guest to a host port that is open.
    fn connect_to_host(&mut self, guest_port: u32, host_port: u32) -> UnixStream {
        self.send(header(Op::Request, guest_port, host_port), &[]);
        assert_eq!(self.only().op(), Some(Op::Response));
        let (port, stream) = self.monitor.try_accept().expect("broker").expect("a connection");
        assert_eq!(port, host_port);
        stream
    }

    /// A connection from the host; returns its host port too.
    fn connect_to_guest(&mut self, guest_port: u32) -> (u32, UnixStream) {
        let stream = self.monitor.try_connect(guest_port).expect("broker");
        stream.set_nonblocking(true).expect("non-blocking");
        let request = self.only();
        assert_eq!(request.op(), Some(Op::Request));
        assert_eq!(request.header.dst_port, guest_port);
        let host_port = request.header.src_port;
        self.send(header(Op::Response, guest_port, host_port), &[]);
        assert!(self.all().is_empty());
        (host_port, stream)
    }
}
