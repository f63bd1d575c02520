//! FUSE requests, to the server that `kiln fs` is.
//!
//! Each script has a directory of its own, beside which lies something that must stay as it is.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::LazyLock;

use kiln_vmm::fuzzing::{FileSystem, SPACE, SharedMemory};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::input::Input;

/// Memory in bytes: the queue, the request and the reply.
const MEMORY: usize = 0x2_0000;
const REQUEST: u64 = 0x1_0000;
const REPLY: u64 = 0x1_8000;
const MAX_REQUEST: usize = 0x4000;
const MAX_REPLY: u32 = 0x4000;

/// The most requests of a script.
const REQUESTS: usize = 32;
/// The largest file that a script may make, in bytes.
const MAX_FILE: u64 = 1 << 20;

const HEADER: usize = 40;
const INIT: u32 = 26;
const ROOT: u64 = 1;

/// The folder in which scripts have theirs, on a memory file system.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let limit = nix::sys::resource::Resource::RLIMIT_FSIZE;
    nix::sys::resource::setrlimit(limit, MAX_FILE, MAX_FILE).expect("limited");
    // What is beyond the limit is to fail and not to end the process.
    // SAFETY: no handler is installed.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    tempfile::tempdir_in("/dev/shm").expect("a folder")
});

/// Some requests, each built from what the guest has been told before.
pub fn requests(script: &[u8]) {
    let shared = FOLDER.path().join("shared");
    let secret = FOLDER.path().join("secret");
    fs::create_dir_all(shared.join("rootfs/dir")).expect("made");
    fs::write(shared.join("rootfs/file"), "contents").expect("written");
    fs::write(&secret, "secret").expect("written");

    let before = taken(&shared);

    let mut guest = Guest::new(FileSystem::new(&shared).expect("served"));
    let mut input = Input::new(script);
    for _ in 0..REQUESTS {
        if input.is_empty() {
            break;
        }
        guest.ask(&mut input);
    }
    // What is written where there seems to be something already may be appended after all, once.
    let most = before + SPACE + MAX_REQUEST as u64;
    assert!(taken(&shared) <= most, "{} bytes taken of {most}", taken(&shared));
    guest.file_system.reset();
    drop(guest);

    assert_eq!(fs::read(&secret).expect("it is there"), b"secret");
    let names = fs::read_dir(FOLDER.path()).expect("read").count();
    assert_eq!(names, 2, "something was made beside the share");
    fs::remove_dir_all(&shared).expect("removed");
}

/// How many bytes of the file system the files of a directory take.
fn taken(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).expect("read").map(|entry| entry.expect("an entry"));
    let sizes = entries.map(|entry| {
        let status = fs::symlink_metadata(entry.path()).expect("it is there");
        let below = if status.is_dir() { taken(&entry.path()) } else { 0 };
        status.blocks() * 512 + below
    });
    sizes.sum()
}

/// What the guest knows, and its queue.
struct Guest {
    file_system: FileSystem,
    memory: SharedMemory,
    queue: Queue,
    offered: u16,
    nodes: Vec<u64>,
    handles: Vec<u64>,
}

impl Guest {
    fn new(file_system: FileSystem) -> Self {
        let mut queue = Queue::new(16).expect("a size");
        queue.try_set_desc_table_address(GuestAddress(0)).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(0x800)).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(0x1000)).expect("aligned");
        queue.set_ready(true);
        let memory = SharedMemory::from_ranges(&[(GuestAddress(0), MEMORY)]).expect("memory");
        let nodes = vec![ROOT];
        let mut guest = Self { file_system, memory, queue, offered: 0, nodes, handles: vec![0] };
        let mut body = Vec::new();
        for field in [7u32, 38, 1 << 20, u32::MAX, u32::MAX] {
            body.extend(field.to_le_bytes());
        }
        body.extend([0; 44]);
        guest.request(INIT, 0, &body, MAX_REPLY);
        for (parent, name) in [(0, &b"rootfs\0"[..]), (1, b"file\0"), (1, b"dir\0")] {
            guest.request(1, guest.nodes[parent], name, MAX_REPLY);
        }
        guest
    }

    fn ask(&mut self, input: &mut Input<'_>) {
        let opcode = match input.u8() {
            255 => input.u32(),
            byte => u32::from(byte % 54),
        };
        let node = self.node(input);
        let mut body = Vec::new();
        for _ in 0..input.below(10) {
            self.piece(input, &mut body);
        }
        let room = match input.u8() {
            byte @ 0..32 => u32::from(byte) * 8,
            _ => MAX_REPLY,
        };
        self.request(opcode, node, &body, room);
    }

    /// A part of a request's body.
    fn piece(&self, input: &mut Input<'_>, body: &mut Vec<u8>) {
        const NAMES: [&[u8]; 10] = [
            b"file\0",
            b"dir\0",
            b"new\0",
            b"..\0",
            b"../secret\0",
            b"user.x\0",
            b"system.posix_acl_access\0",
            b"security.capability\0",
            b"/\0",
            b"\0",
        ];
        const NUMBERS: [u64; 8] = [0, 1, 4096, 1 << 31, 1 << 32, (1 << 63) - 1, 1 << 63, u64::MAX];
        match input.u8() % 8 {
            0 => body.extend(input.u64().to_le_bytes()),
            1 => body.extend(input.u32().to_le_bytes()),
            2 => body.extend(self.node(input).to_le_bytes()),
            3 => body.extend(input.choose(&self.handles).to_le_bytes()),
            4 => body.extend(input.choose(&NAMES)),
            5 => body.extend(input.choose(&NUMBERS).to_le_bytes()),
            6 => body.extend(std::iter::repeat_n(0, input.below(64))),
            _ => {
                let count = input.below(64);
                body.extend(input.bytes(count));
            }
        }
    }

    fn node(&self, input: &mut Input<'_>) -> u64 {
        match input.u8() {
            255 => input.u64(),
            byte => self.nodes[usize::from(byte) % self.nodes.len()],
        }
    }

    /// Has a request served and learns from the reply.
    fn request(&mut self, opcode: u32, node: u64, body: &[u8], room: u32) {
        let mut request = Vec::with_capacity(HEADER + body.len());
        request.extend(((HEADER + body.len()) as u32).to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(9u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend([0; 16]);
        request.extend(body);
        request.truncate(MAX_REQUEST);
        self.write(REQUEST, &request);
        self.write_descriptor(0, REQUEST, request.len() as u32, 1, 1);
        self.write_descriptor(1, REPLY, room, 2, 0);
        self.write(0x800 + 4 + 2 * u64::from(self.offered % 16), &0u16.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        self.write(0x802, &self.offered.to_le_bytes());
        let used = self.file_system.serve(&self.memory, &mut self.queue).expect("it was served");
        assert!(used <= room, "{used} bytes of {room}");
        let mut reply = vec![0; used as usize];
        self.memory.read_slice(&mut reply, GuestAddress(REPLY)).expect("in memory");
        self.learn(opcode, &reply);
    }

    /// Keeps a node id or a handle that a successful reply holds.
    fn learn(&mut self, opcode: u32, reply: &[u8]) {
        let number =
            |at: usize| reply.get(at..at + 8).map(|n| u64::from_le_bytes(n.try_into().unwrap()));
        if reply.get(4..8) != Some(&[0; 4]) {
            return;
        }
        match opcode {
            // LOOKUP, SYMLINK, MKNOD, MKDIR, LINK
            1 | 6 | 8 | 9 | 13 => self.nodes.extend(number(16)),
            // OPEN, OPENDIR
            14 | 27 => self.handles.extend(number(16)),
            // CREATE, TMPFILE
            35 | 51 => {
                self.nodes.extend(number(16));
                self.handles.extend(number(16 + 128));
            }
            _ => {}
        }
    }

    fn write_descriptor(&self, index: u64, address: u64, length: u32, flags: u16, next: u16) {
        let at = 16 * index;
        self.write(at, &address.to_le_bytes());
        self.write(at + 8, &length.to_le_bytes());
        self.write(at + 12, &flags.to_le_bytes());
        self.write(at + 14, &next.to_le_bytes());
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(at)).expect("in memory");
    }
}
