//! A virtio-fs driver of one request queue, behind the kvm engine's vhost-user frontend.

// Each test binary uses its own part.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};

use kiln_vmm::GuestMemory;
use kiln_vmm::transport::vhost_user_frontend::{Description, VhostUserBackend};
use kiln_vmm::transport::{Activation, Backend, Interrupt};
use kiln_vmm::virtio::fs;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const MEMORY: usize = 4 << 20;
const QUEUE_AT: u64 = 0x1000;
pub const REQUEST_AT: u64 = 0x10_0000;
const REPLY_AT: u64 = 0x20_0000;

/// Seconds after which a device that does not answer has failed.
const PATIENCE: i64 = 60;

/// The first request queue.
const QUEUE: usize = 1;

/// Operations, `enum fuse_opcode` of include/uapi/linux/fuse.h.
pub mod opcode {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const CREATE: u32 = 35;
    pub const BATCH_FORGET: u32 = 42;
    pub const FALLOCATE: u32 = 43;
    pub const RENAME2: u32 = 45;
    pub const TMPFILE: u32 = 51;
}

/// A descriptor: address, length, flags, next.
pub type Descriptor = (u64, u32, u16, u16);

/// Connects to an fs backend.
pub fn connect(socket: &Path, on_lost: impl FnOnce() + Send + 'static) -> VhostUserBackend {
    let connection = UnixStream::connect(socket).unwrap();
    let description = Description::file_system("kiln").unwrap();
    VhostUserBackend::new(connection, description, on_lost).unwrap()
}

/// The driver's side of one activation.
pub struct Driver {
    pub memory: GuestMemory,
    pub doorbell: EventFd,
    pub interrupt: EventFd,
    pub needs_reset: Arc<AtomicBool>,
}

fn guest_memory() -> GuestMemory {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(file);
    file.set_len(MEMORY as u64).unwrap();
    let region = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    GuestMemory::from_regions(vec![region]).unwrap()
}

impl Driver {
    /// Sets the queue up and the device going.
    pub fn activate(backend: &mut VhostUserBackend) -> Self {
        let memory = guest_memory();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let doorbells: Vec<EventFd> = (0..fs::QUEUES).map(|_| event()).collect();
        let doorbell = doorbells[QUEUE].try_clone().unwrap();
        let eventfd = event();
        let interrupt = eventfd.try_clone().unwrap();
        let needs_reset = Arc::new(AtomicBool::new(false));
        let queue = |index| {
            let mut queue = Queue::new(fs::QUEUE_SIZE).unwrap();
            queue.set_size(16);
            queue.set_desc_table_address(Some(QUEUE_AT as u32), None);
            queue.set_avail_ring_address(Some(QUEUE_AT as u32 + 0x100), None);
            queue.set_used_ring_address(Some(QUEUE_AT as u32 + 0x200), None);
            queue.set_ready(index == QUEUE);
            queue
        };
        let activation = Activation {
            memory: memory.clone(),
            features: backend.features() & (1 << 32),
            queues: (0..fs::QUEUES).map(queue).collect(),
            doorbells,
            interrupt: Interrupt {
                status: Arc::new(AtomicU32::new(0)),
                eventfd: Arc::new(eventfd),
                needs_reset: Arc::clone(&needs_reset),
            },
        };
        backend.activate(activation).unwrap();
        Self { memory, doorbell, interrupt, needs_reset }
    }

    /// Has a request served, with `room` bytes for the reply; returns the reply.
    pub fn request(&self, request: &[u8], room: u32) -> Vec<u8> {
        self.memory.write_slice(request, GuestAddress(REQUEST_AT)).unwrap();
        let length = request.len() as u32;
        let used = self.chain(&[(REQUEST_AT, length, 1, 1), (REPLY_AT, room, 2, 0)]);
        assert!(used <= room, "{used} bytes used of {room}");
        let mut reply = vec![0; used as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY_AT)).unwrap();
        reply
    }

    /// Makes a chain of descriptors available and waits for it to be used; returns the number of
    /// bytes that the device says it has written.
    pub fn chain(&self, descriptors: &[Descriptor]) -> u32 {
        for (index, (address, length, flags, next)) in descriptors.iter().enumerate() {
            let at = QUEUE_AT + 16 * index as u64;
            self.memory.write_obj(*address, GuestAddress(at)).unwrap();
            self.memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            self.memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            self.memory.write_obj(*next, GuestAddress(at + 14)).unwrap();
        }
        let index = self.available();
        let slot = QUEUE_AT + 0x104 + 2 * u64::from(index % 16);
        self.memory.write_obj(0u16, GuestAddress(slot)).unwrap();
        self.set_available(index.wrapping_add(1));
        self.doorbell.write(1).unwrap();

        // SAFETY: the event fd is open while it is polled.
        let interrupt = unsafe { BorrowedFd::borrow_raw(self.interrupt.as_raw_fd()) };
        let fd = PollFd::from_borrowed_fd(interrupt, PollFlags::IN);
        let patience = Timespec { tv_sec: PATIENCE, tv_nsec: 0 };
        assert_eq!(poll(&mut [fd], Some(&patience)), Ok(1), "the device does not answer");
        self.interrupt.read().unwrap();
        assert_eq!(self.used(), index.wrapping_add(1));
        let length = QUEUE_AT + 0x204 + 8 * u64::from(index % 16) + 4;
        self.memory.read_obj(GuestAddress(length)).unwrap()
    }

    /// How many chains have been made available.
    pub fn available(&self) -> u16 {
        self.memory.read_obj(GuestAddress(QUEUE_AT + 0x102)).unwrap()
    }

    /// Says how many chains are available.
    pub fn set_available(&self, index: u16) {
        self.memory.write_obj(index, GuestAddress(QUEUE_AT + 0x102)).unwrap();
    }

    /// How many chains have been used.
    pub fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(QUEUE_AT + 0x202)).unwrap()
    }
}

/// A request: header and body, the length filled in.
pub fn request(opcode: u32, unique: u64, node: u64, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(40 + body.len());
    bytes.extend((40 + body.len() as u32).to_le_bytes());
    bytes.extend(opcode.to_le_bytes());
    bytes.extend(unique.to_le_bytes());
    bytes.extend(node.to_le_bytes());
    // uid, gid, pid, extensions' length and padding
    bytes.extend([0; 16]);
    bytes.extend(body);
    bytes
}

/// `FUSE_INIT` of protocol 7.38 that offers every feature.
pub fn init() -> Vec<u8> {
    let mut body = Vec::new();
    for field in [7u32, 38, 1 << 20, u32::MAX, u32::MAX] {
        body.extend(field.to_le_bytes());
    }
    body.extend([0; 44]);
    request(26, 1, 0, &body)
}

/// The error number in a reply, 0 for none.
pub fn error(reply: &[u8]) -> i32 {
    -i32::from_le_bytes(reply[4..8].try_into().unwrap())
}
