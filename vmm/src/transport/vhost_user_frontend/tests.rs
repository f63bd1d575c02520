use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::channel;

use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtio_queue::QueueT;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryAtomic, GuestMemoryMmap, GuestRegionMmap,
    MmapRegion,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::transport::Interrupt;
use crate::virtio::fs::test_backend;

const MEMORY: usize = 1 << 20;
const QUEUE_AT: u64 = 0x1000;
const REQUEST_AT: u64 = 0x8000;
const REPLY_AT: u64 = 0x9000;

/// An fs backend of this process that serves one connection.
fn serve(directory: &tempfile::TempDir) -> UnixStream {
    let path = directory.path().join("socket");
    let shared = directory.path().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mut listener = Listener::from(UnixListener::bind(&path).unwrap());
    let connection = UnixStream::connect(&path).unwrap();
    let backend = Arc::new(test_backend(&shared));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("test".to_owned(), backend, memory).unwrap();
    daemon.start(&mut listener).unwrap();
    std::thread::spawn(move || {
        let _ = daemon.wait();
    });
    connection
}

fn guest_memory() -> GuestMemory {
    let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = std::fs::File::from(file);
    file.set_len(MEMORY as u64).unwrap();
    let region = MmapRegion::from_file(FileOffset::new(file, 0), MEMORY).unwrap();
    let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
    GuestMemory::from_regions(vec![region]).unwrap()
}

/// The driver's side of one activation: only the first request queue is set up.
struct Driver {
    memory: GuestMemory,
    doorbell: EventFd,
    interrupt: EventFd,
    needs_reset: Arc<AtomicBool>,
}

impl Driver {
    fn activate(backend: &mut VhostUserBackend) -> Self {
        let memory = guest_memory();
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let doorbells: Vec<EventFd> = (0..fs::QUEUES).map(|_| event()).collect();
        let doorbell = doorbells[1].try_clone().unwrap();
        let eventfd = event();
        let interrupt = eventfd.try_clone().unwrap();
        let needs_reset = Arc::new(AtomicBool::new(false));
        let queue = |index| {
            let mut queue = Queue::new(fs::QUEUE_SIZE).unwrap();
            queue.set_size(16);
            queue.set_desc_table_address(Some(QUEUE_AT as u32), None);
            queue.set_avail_ring_address(Some(QUEUE_AT as u32 + 0x100), None);
            queue.set_used_ring_address(Some(QUEUE_AT as u32 + 0x200), None);
            queue.set_ready(index == 1);
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

    /// Makes a request and its reply's buffer available and waits for the device to have used them.
    fn request(&self, request: &[u8]) -> Vec<u8> {
        let memory = &self.memory;
        memory.write_slice(request, GuestAddress(REQUEST_AT)).unwrap();
        let descriptors: [(u64, u32, u16, u16); 2] =
            [(REQUEST_AT, request.len() as u32, 1, 1), (REPLY_AT, 4096, 2, 0)];
        for (index, (address, length, flags, next)) in descriptors.into_iter().enumerate() {
            let at = GuestAddress(QUEUE_AT + 16 * index as u64);
            memory.write_obj(address, at).unwrap();
            memory.write_obj(length, GuestAddress(at.0 + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
            memory.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
        }
        let available = GuestAddress(QUEUE_AT + 0x102);
        let index: u16 = memory.read_obj(available).unwrap();
        let slot = GuestAddress(QUEUE_AT + 0x104 + 2 * u64::from(index % 16));
        memory.write_obj(0u16, slot).unwrap();
        memory.write_obj(index + 1, available).unwrap();
        self.doorbell.write(1).unwrap();

        // SAFETY: the event fd is open while it is polled.
        let interrupt = unsafe { std::os::fd::BorrowedFd::borrow_raw(self.interrupt.as_raw_fd()) };
        let poll_fd =
            rustix::event::PollFd::from_borrowed_fd(interrupt, rustix::event::PollFlags::IN);
        rustix::event::poll(&mut [poll_fd], None).unwrap();
        self.interrupt.read().unwrap();
        let used: u32 = memory
            .read_obj(GuestAddress(QUEUE_AT + 0x204 + 8 * u64::from(index % 16) + 4))
            .unwrap();
        let mut reply = vec![0; used as usize];
        memory.read_slice(&mut reply, GuestAddress(REPLY_AT)).unwrap();
        reply
    }
}

/// `FUSE_INIT` of protocol 7.38 with nothing in it but the version.
fn init_request() -> Vec<u8> {
    let mut request = Vec::new();
    for field in [56u32, 26] {
        request.extend(field.to_le_bytes());
    }
    request.extend(7u64.to_le_bytes());
    request.extend([0; 24]);
    for field in [7u32, 38, 0, 0] {
        request.extend(field.to_le_bytes());
    }
    request
}

#[test]
fn a_driver_is_served_by_another_process_and_again_after_a_reset() {
    let directory = tempfile::tempdir().unwrap();
    let connection = serve(&directory);
    let description = Description::file_system("kiln").unwrap();
    let mut backend = VhostUserBackend::new(connection, description, || {}).unwrap();
    assert_eq!(backend.device_type(), 26);
    assert_eq!(backend.features() & NOT_VIRTIO, 0);

    for _ in 0..2 {
        let driver = Driver::activate(&mut backend);
        for _ in 0..20 {
            let reply = driver.request(&init_request());
            let (error, unique) = (&reply[4..8], &reply[8..16]);
            assert_eq!((error, unique), (&[0; 4][..], &7u64.to_le_bytes()[..]));
        }
        backend.reset();
        // What is made available after the reset stays as it is.
        driver.memory.write_obj(0u32, GuestAddress(REPLY_AT)).unwrap();
        driver.memory.write_obj(21u16, GuestAddress(QUEUE_AT + 0x102)).unwrap();
        driver.doorbell.write(1).unwrap();
        let used: u16 = driver.memory.read_obj(GuestAddress(QUEUE_AT + 0x202)).unwrap();
        assert_eq!(used, 20);
    }
}

#[test]
fn the_configuration_space_holds_the_tag_and_the_number_of_request_queues() {
    let config = Description::file_system("kiln").unwrap().config;
    assert_eq!(&config[..5], b"kiln\0");
    assert_eq!(&config[36..], &2u32.to_le_bytes());
    assert!(Description::file_system("").is_err());
    assert!(Description::file_system(&"x".repeat(36)).is_ok());
    assert!(Description::file_system(&"x".repeat(37)).is_err());
}

#[test]
fn a_peer_that_goes_away_is_noticed() {
    let directory = tempfile::tempdir().unwrap();
    let connection = serve(&directory);
    // What the peer's death does to the connection.
    let closer = connection.try_clone().unwrap();
    let (sender, lost) = channel();
    let description = Description::file_system("kiln").unwrap();
    let on_lost = move || sender.send(()).unwrap();
    let mut backend = VhostUserBackend::new(connection, description, on_lost).unwrap();
    let driver = Driver::activate(&mut backend);
    closer.shutdown(std::net::Shutdown::Both).unwrap();
    lost.recv().unwrap();
    assert!(driver.needs_reset.load(Ordering::SeqCst));
    assert_eq!(driver.interrupt.read().unwrap(), 1);
    backend.reset();
}
