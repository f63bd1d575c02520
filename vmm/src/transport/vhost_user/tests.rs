//! The back-end against a front-end that the tests play.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::{self, JoinHandle};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost::vhost_user::{Frontend, VhostUserFrontend, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use vm_memory::{Bytes, FileOffset, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::{ServeError, serve};
use crate::GuestMemory;
use crate::virtio::block::Block;
use crate::virtio::ring::Ring;
use crate::virtio::vsock::Vsock;
use crate::virtio::vsock::broker::Broker;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice};

const MEMORY: usize = 0x40_000;

/// Where the front-end claims to have the guest's memory in its own.
const FRONT_END: u64 = 0x7000_0000_0000;

const HEADER: u64 = 0x10_000;
const DATA: u64 = 0x11_000;
const STATUS: u64 = 0x12_000;

/// A device being served, and the front-end's side of it.
struct Setup {
    front_end: Frontend,
    memory: GuestMemory,
    memory_file: std::fs::File,
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    until: Option<UnixStream>,
    serving: JoinHandle<Result<(), ServeError>>,
}

/// Serves a device until the stream returned is dropped.
fn start(
    device: Box<dyn VirtioDevice>,
) -> (UnixStream, UnixStream, JoinHandle<Result<(), ServeError>>) {
    let directory = tempfile::tempdir().expect("directory");
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).expect("listens");
    let (until, other) = UnixStream::pair().expect("pair");
    let serving = thread::spawn(move || serve(device, &listener, other.as_fd()));
    (UnixStream::connect(path).expect("connects"), until, serving)
}

fn disk() -> Box<dyn VirtioDevice> {
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(&[0x5a; 4096]).expect("writes");
    Box::new(Block::new(file, false, "disk").expect("disk"))
}

impl Setup {
    /// Goes as far as a front-end does before it sets queues up.
    fn new(device: Box<dyn VirtioDevice>) -> Self {
        let (stream, until, serving) = start(device);
        let memory_file = tempfile::tempfile().expect("file");
        memory_file.set_len(MEMORY as u64).expect("grows");
        let file = FileOffset::new(memory_file.try_clone().expect("clones"), 0);
        let ranges = [(GuestAddress(0), MEMORY, Some(file))];
        let memory = GuestMemory::from_ranges_with_files(ranges).expect("memory");

        let mut front_end = Frontend::from_stream(stream, 3);
        front_end.set_owner().expect("owner");
        let features = front_end.get_features().expect("features");
        // The driver of these tests wants every interrupt.
        front_end.set_features(features & !(1 << VIRTIO_RING_F_EVENT_IDX)).expect("features");
        let protocol = front_end.get_protocol_features().expect("protocol features");
        assert!(protocol.contains(VhostUserProtocolFeatures::CONFIG));
        front_end
            .set_protocol_features(
                VhostUserProtocolFeatures::CONFIG | VhostUserProtocolFeatures::REPLY_ACK,
            )
            .expect("protocol features");
        front_end.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        let event = || EventFd::new(libc::EFD_NONBLOCK).expect("eventfd");
        let setup = Self {
            front_end,
            memory,
            memory_file,
            kick: event(),
            call: event(),
            error: event(),
            until: Some(until),
            serving,
        };
        setup.send_memory();
        setup
    }

    fn send_memory(&self) {
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: 0,
            memory_size: MEMORY as u64,
            userspace_addr: FRONT_END,
            mmap_offset: 0,
            mmap_handle: self.memory_file.as_raw_fd(),
        };
        self.front_end.set_mem_table(&[region]).expect("memory table");
    }

    fn addresses([descriptors, available, used]: [u64; 3]) -> VringConfigData {
        VringConfigData {
            queue_max_size: 16,
            queue_size: 16,
            flags: 0,
            desc_table_addr: FRONT_END + descriptors,
            used_ring_addr: FRONT_END + used,
            avail_ring_addr: FRONT_END + available,
            log_addr: None,
        }
    }

    /// Starts queue 0 where `ring` has it.
    fn begin(&mut self, ring: &Ring<'_>, base: u16) {
        self.front_end.set_vring_num(0, 16).expect("size");
        let addresses = Self::addresses(ring.addresses());
        self.front_end.set_vring_addr(0, &addresses).expect("addresses");
        self.front_end.set_vring_base(0, base).expect("base");
        self.front_end.set_vring_call(0, &self.call).expect("call");
        self.front_end.set_vring_err(0, &self.error).expect("error");
        self.front_end.set_vring_kick(0, &self.kick).expect("kick");
        self.front_end.set_vring_enable(0, true).expect("enable");
    }

    /// Offers a read of the first sector.
    fn offer_read(&self, ring: &mut Ring<'_>) {
        self.memory.write_slice(&[0; 16], GuestAddress(HEADER)).expect("in memory");
        ring.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    }

    /// Waits for an eventfd to be signalled.
    fn wait(eventfd: &EventFd) {
        // SAFETY: the eventfd outlives the borrow.
        let fd = unsafe { std::os::fd::BorrowedFd::borrow_raw(eventfd.as_raw_fd()) };
        poll(&mut [PollFd::from_borrowed_fd(fd, PollFlags::IN)], None).expect("polls");
        eventfd.read().expect("signalled");
    }

    /// The front-end goes away; returns how the serving ended once `until` is closed too.
    fn hang_up(mut self) -> Result<(), ServeError> {
        drop(self.front_end);
        drop(self.until.take());
        self.serving.join().expect("no panic")
    }
}

#[test]
fn a_queue_is_served_stopped_and_served_again() {
    let mut setup = Setup::new(disk());
    let memory = setup.memory.clone();
    let mut ring = Ring::new(&memory, 0, 16);
    // Offered before the queue starts, and never kicked for.
    setup.offer_read(&mut ring);
    setup.begin(&ring, 0);
    Setup::wait(&setup.call);
    assert_eq!(ring.used(), [(0, 513)]);
    let mut data = [0; 512];
    memory.read_slice(&mut data, GuestAddress(DATA)).expect("in memory");
    assert_eq!(data, [0x5a; 512]);

    setup.offer_read(&mut ring);
    setup.kick.write(1).expect("kicks");
    Setup::wait(&setup.call);
    assert_eq!(ring.used().len(), 2);

    assert_eq!(setup.front_end.get_vring_base(0).expect("stops"), 2);
    setup.offer_read(&mut ring);
    setup.kick.write(1).expect("kicks");
    setup.front_end.get_features().expect("still answers");
    assert_eq!(ring.used().len(), 2, "a stopped queue is not touched");

    setup.begin(&ring, 2);
    Setup::wait(&setup.call);
    assert_eq!(ring.used().len(), 3, "it goes on where it was");
    setup.hang_up().expect("served to the end");
}

#[test]
fn a_failed_device_says_so_and_works_after_a_reset() {
    let mut setup = Setup::new(disk());
    let memory = setup.memory.clone();
    let mut ring = Ring::new(&memory, 0, 16);
    ring.offer(&[(u64::MAX - 4, 16, false), (STATUS, 1, true)]);
    setup.begin(&ring, 0);
    Setup::wait(&setup.error);
    setup.kick.write(1).expect("kicks");
    assert!(ring.used().is_empty());

    setup.front_end.get_vring_base(0).expect("stops");
    memory.write_slice(&[0; 0x3000], GuestAddress(0)).expect("in memory");
    let mut ring = Ring::new(&memory, 0, 16);
    setup.offer_read(&mut ring);
    setup.begin(&ring, 0);
    Setup::wait(&setup.call);
    assert_eq!(ring.used(), [(0, 513)]);
    setup.hang_up().expect("served to the end");
}

#[test]
fn configuration_is_the_device_s() {
    let mut setup = Setup::new(disk());
    let flags = VhostUserConfigFlags::empty();
    let (_, config) = setup.front_end.get_config(0, 8, flags, &[0; 8]).expect("config");
    assert_eq!(config, 8u64.to_le_bytes());
    setup.hang_up().expect("served to the end");
}

#[test]
fn rings_outside_of_memory_are_refused() {
    for wrong in [
        [MEMORY as u64, 0x1000, 0x2000],
        [0, MEMORY as u64 - 16, 0x2000],
        [0, 0x1000, MEMORY as u64 - 4],
        [u64::MAX - FRONT_END - 15, 0x1000, 0x2000],
        [1, 0x1000, 0x2000],
    ] {
        let mut setup = Setup::new(disk());
        setup.front_end.set_vring_num(0, 16).expect("size");
        let set = setup.front_end.set_vring_addr(0, &Setup::addresses(wrong));
        let started = set
            .and_then(|()| setup.front_end.set_vring_kick(0, &setup.kick))
            .map_err(io::Error::other)
            .and_then(|()| setup.front_end.set_vring_enable(0, true).map_err(io::Error::other));
        assert!(started.is_err(), "{wrong:#x?}");
        assert!(matches!(setup.hang_up(), Err(ServeError::Protocol(_))), "{wrong:#x?}");
    }
}

#[test]
fn a_device_without_host_events_ends_with_its_front_end() {
    let setup = Setup::new(disk());
    drop(setup.front_end);
    setup.serving.join().expect("no panic").expect("served to the end");
}

#[test]
fn a_device_with_host_events_ends_when_it_is_told() {
    let (_monitor, device_end) = Broker::pair().expect("broker");
    let vsock = Vsock::new(3, &[], device_end).expect("vsock");
    let setup = Setup::new(Box::new(vsock));
    drop(setup.front_end);
    drop(setup.until);
    setup.serving.join().expect("no panic").expect("served to the end");

    let (_monitor, device_end) = Broker::pair().expect("broker");
    let vsock = Vsock::new(3, &[], device_end).expect("vsock");
    let (nobody, until, serving) = start(Box::new(vsock));
    drop(until);
    serving.join().expect("no panic").expect("ends without a front-end's word");
    drop(nobody);
}

/// Looks like a network device, and does nothing.
struct Idle;

impl VirtioDevice for Idle {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 256]
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn process(
        &mut self,
        _event: Event,
        _queues: &mut Queues<'_, '_>,
    ) -> Result<Used, DeviceError> {
        Ok(Used::NONE)
    }

    fn reset(&mut self) {}
}

/// Numbers of messages, of the specification.
const GET_FEATURES: u32 = 1;
const SET_OWNER: u32 = 3;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;

/// A message with its header: version 1, and whether a reply is wanted.
fn message(request: u32, wants_reply: bool, body: &[u8]) -> Vec<u8> {
    let flags = 1 | u32::from(wants_reply) << 3;
    let header = [request, flags, body.len() as u32];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(body.iter().copied()).collect()
}

/// The number that a message is answered with.
fn answer(stream: &mut UnixStream, request: u32) -> u64 {
    let mut bytes = [0; 20];
    stream.read_exact(&mut bytes).expect("an answer");
    assert_eq!(bytes[..4], request.to_le_bytes());
    u64::from_le_bytes(bytes[12..].try_into().expect("8 bytes"))
}

#[test]
fn rings_are_enabled_before_anything_else_with_a_reply_for_who_wants_it() {
    let (mut stream, until, serving) = start(Box::new(Idle));
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).expect("time-out");
    let mut send = |request, wants_reply, body: &[u8], answered: bool| {
        stream.write_all(&message(request, wants_reply, body)).expect("sends");
        if answered { answer(&mut stream, request) } else { 0 }
    };
    send(SET_OWNER, false, &[], false);
    send(GET_FEATURES, false, &[], true);
    let protocol = send(GET_PROTOCOL_FEATURES, false, &[], true);
    send(SET_PROTOCOL_FEATURES, false, &protocol.to_le_bytes(), false);
    assert_ne!(protocol & VhostUserProtocolFeatures::REPLY_ACK.bits(), 0);
    // QEMU wants it since version 8.2.
    for wants_reply in [false, true] {
        for ring in [0u32, 1] {
            let body = [ring.to_le_bytes(), 1u32.to_le_bytes()].concat();
            assert_eq!(send(SET_VRING_ENABLE, wants_reply, &body, wants_reply), 0);
        }
    }
    // Nothing was answered that nobody asked for.
    send(GET_FEATURES, false, &[], true);
    drop((stream, until));
    serving.join().expect("no panic").expect("served to the end");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_messages_are_survived(
        messages in prop::collection::vec(
            (0..45u32, 0..4u32, prop::collection::vec(any::<u8>(), 0..64), any::<bool>()), 1..20),
    ) {
        let (mut stream, until, serving) = start(disk());
        for (request, flags, body, with_fd) in messages {
            let mut bytes = Vec::new();
            bytes.extend(request.to_le_bytes());
            bytes.extend((1 | flags << 2).to_le_bytes());
            bytes.extend((body.len() as u32).to_le_bytes());
            bytes.extend(body);
            let sent = if with_fd { send_with_fd(&stream, &bytes) } else { stream.write_all(&bytes) };
            if sent.is_err() {
                break;
            }
        }
        drop(stream);
        drop(until);
        // Whatever it says of the front-end, it ends and does not panic.
        let _ = serving.join().expect("no panic");
    }
}

fn send_with_fd(stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    let fd: OwnedFd = tempfile::tempfile()?.into();
    let fds = [fd.as_fd()];
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    sendmsg(stream, &[io::IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
