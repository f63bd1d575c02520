//! The limits that the fs backend process keeps, against a guest that keeps to none.

#![allow(clippy::unwrap_used)]

mod fs_driver;
mod fs_guest;

use std::fs;
use std::num::NonZeroU64;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use fs_driver::opcode::{
    CREATE, FALLOCATE, FORGET, LINK, LOOKUP, MKDIR, OPEN, RELEASE, RENAME, SETXATTR, SYMLINK,
    TMPFILE, UNLINK, WRITE,
};
use fs_driver::{Driver, connect, error, init, request};
use fs_guest::{FsProcess, Mount};
use kiln_vmm::config::FileLimits;
use kiln_vmm::transport::Backend;
use kiln_vmm::transport::vhost_user_frontend::VhostUserBackend;

const ROOT: u64 = 1;

const SPACE: u64 = 256 << 10;

/// A share with a limit, to a driver that has said `FUSE_INIT`. One directory is its root file system
/// and mount 0 as well.
struct Served {
    directory: tempfile::TempDir,
    _socket: tempfile::TempDir,
    process: FsProcess,
    backend: VhostUserBackend,
    driver: Driver,
}

/// A file that the guest has open.
#[derive(Clone, Copy)]
struct Open {
    node: u64,
    handle: u64,
}

impl Served {
    fn begin(files: FileLimits) -> Self {
        Self::begin_in("/dev/shm", files)
    }

    /// Shares a directory that is made in `place`.
    fn begin_in(place: &str, files: FileLimits) -> Self {
        let directory = tempfile::tempdir_in(place).unwrap();
        // A socket's path has to be short.
        let socket = tempfile::tempdir_in("/dev/shm").unwrap();
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let limits = fs_guest::Limits { files, ..Default::default() };
        let again = Mount { source: shared.clone(), read_only: false };
        let process = FsProcess::start_limited(socket.path(), &shared, &[again], limits);
        let mut backend = connect(&process.socket, || {});
        let driver = Driver::activate(&mut backend);
        assert_eq!(error(&driver.request(&init(), 4096)), 0);
        Self { directory, _socket: socket, process, backend, driver }
    }

    fn with_space() -> Self {
        Self::begin(FileLimits { space: NonZeroU64::new(SPACE), ..FileLimits::default() })
    }

    /// On a disk: what only a disk's file system allocates shows.
    fn with_space_on_disk() -> Self {
        let space = FileLimits { space: NonZeroU64::new(SPACE), ..FileLimits::default() };
        Self::begin_in(env!("CARGO_TARGET_TMPDIR"), space)
    }

    fn look_up(&self, parent: u64, name: &[u8]) -> u64 {
        node_in(&self.ask(LOOKUP, parent, &[name]).unwrap())
    }

    fn rootfs(&self) -> u64 {
        self.look_up(ROOT, b"rootfs\0")
    }

    /// The same directory by another mount.
    fn mount(&self) -> u64 {
        self.look_up(self.look_up(ROOT, b"mounts\0"), b"0\0")
    }

    fn open(&self, node: u64) -> Open {
        let flags = libc::O_RDWR.cast_unsigned().to_le_bytes();
        let reply = self.ask(OPEN, node, &[&flags, &[0; 4]]).unwrap();
        Open { node, handle: u64::from_le_bytes(reply[..8].try_into().unwrap()) }
    }

    fn make_directory(&self, name: &str) -> Result<u64, i32> {
        let body: [&[u8]; 3] = [&[0; 8], name.as_bytes(), b"\0"];
        self.ask(MKDIR, self.rootfs(), &body).map(|reply| node_in(&reply))
    }

    fn close(&self, file: Open) {
        let fields = [file.handle, 0, 0].map(u64::to_le_bytes).concat();
        self.ask(RELEASE, file.node, &[&fields]).unwrap();
    }

    fn unlink(&self, name: &[u8]) {
        self.ask(UNLINK, self.rootfs(), &[name]).unwrap();
    }

    fn forget(&self, node: u64) {
        let forget = request(FORGET, 3, node, &99u64.to_le_bytes());
        assert!(self.driver.request(&forget, 4096).is_empty());
    }

    /// Whether more than a little can be added; what is, is removed again.
    fn has_room(&self) -> bool {
        let Ok(file) = self.create(b"probe\0", 0) else { return false };
        let filled = self.fill(file);
        self.unlink(b"probe\0");
        self.close(file);
        self.forget(file.node);
        filled > 32 << 10
    }

    /// What a request is answered, without the header; or the error.
    fn ask(&self, opcode: u32, node: u64, body: &[&[u8]]) -> Result<Vec<u8>, i32> {
        let reply = self.driver.request(&request(opcode, 2, node, &body.concat()), 4096);
        match error(&reply) {
            0 => Ok(reply[16..].to_vec()),
            errno => Err(errno),
        }
    }

    fn create(&self, name: &[u8], flags: i32) -> Result<Open, i32> {
        let fields = [(libc::O_RDWR | flags).cast_unsigned(), 0o100_600, 0, 0];
        let reply =
            self.ask(CREATE, self.rootfs(), &[&fields.map(u32::to_le_bytes).concat(), name])?;
        let number = |at: usize| u64::from_le_bytes(reply[at..at + 8].try_into().unwrap());
        // What is known of the file (`fuse_entry_out`) is 128 bytes.
        Ok(Open { node: number(0), handle: number(128) })
    }

    fn write(&self, file: Open, offset: u64, data: &[u8]) -> Result<(), i32> {
        let length = (data.len() as u32).to_le_bytes();
        let (handle, offset) = (file.handle.to_le_bytes(), offset.to_le_bytes());
        self.ask(WRITE, file.node, &[&handle, &offset, &length, &[0; 20], data]).map(drop)
    }

    fn allocate(&self, file: Open, length: u64) -> Result<(), i32> {
        let fields = [file.handle, 0, length, 0].map(u64::to_le_bytes).concat();
        self.ask(FALLOCATE, file.node, &[&fields]).map(drop)
    }

    /// Writes to a file from its begin on until it is refused; gives how much that was.
    fn fill(&self, file: Open) -> u64 {
        let data = [7; 16 << 10];
        let mut offset = 0;
        loop {
            match self.write(file, offset, &data) {
                Ok(()) => offset += data.len() as u64,
                Err(errno) => {
                    assert_eq!(errno, libc::EDQUOT);
                    return offset;
                }
            }
        }
    }

    /// How much the share takes of the host's file system.
    fn taken(&self) -> u64 {
        taken(&self.directory.path().join("shared"))
    }

    fn end(mut self) {
        self.backend.reset();
        drop(self.backend);
        self.process.wait();
    }
}

fn node_in(reply: &[u8]) -> u64 {
    u64::from_le_bytes(reply[..8].try_into().unwrap())
}

fn taken(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    let sizes = entries.map(|entry| {
        let metadata = entry.metadata().unwrap();
        let below = if metadata.is_dir() { taken(&entry.path()) } else { 0 };
        metadata.blocks() * 512 + below
    });
    sizes.sum()
}

#[test]
fn whatever_adds_is_refused_beyond_the_limit_and_the_monitor_is_told_once() {
    let served = Served::with_space();
    let file = served.create(b"file\0", 0).unwrap();
    let filled = served.fill(file);
    assert!((SPACE - (32 << 10)..=SPACE).contains(&filled), "{filled} bytes");
    assert!(served.taken() <= SPACE, "{} bytes", served.taken());

    assert_eq!(served.allocate(file, 1 << 40), Err(libc::EDQUOT));
    let mut more = 0;
    while let Ok(another) = served.create(format!("{more}\0").as_bytes(), 0) {
        assert_eq!(served.write(another, 0, &[7; 16 << 10]), Err(libc::EDQUOT));
        more += 1;
        assert!(more < 64, "files have no end");
    }
    let made = served.ask(MKDIR, served.rootfs(), &[&[0; 8], b"dir\0"]);
    assert_eq!(made, Err(libc::EDQUOT));
    let value = [&16u32.to_le_bytes()[..], &[0; 12], b"user.x\0", &[1; 1024]].concat();
    assert!(served.ask(SETXATTR, file.node, &[&value]).is_err());
    assert!(served.taken() <= SPACE, "{} bytes", served.taken());

    // What is there can be written again.
    served.write(file, 0, &[8; 16 << 10]).unwrap();
    assert_eq!(served.process.told(), "\"space_used_up\"");
    served.end();
}

#[test]
fn appending_where_something_is_written_again_goes_beyond_by_one_request_at_most() {
    let served = Served::with_space();
    let filled = served.create(b"file\0", 0).unwrap();
    served.fill(filled);
    let appended = served.create(b"file\0", libc::O_APPEND).unwrap();
    let data = [9; 16 << 10];
    for _ in 0..8 {
        let _ = served.write(appended, 0, &data);
    }
    let taken = served.taken();
    assert!(taken <= SPACE + data.len() as u64, "{taken} bytes");
    served.end();
}

#[test]
fn space_comes_back_once_a_file_is_gone_and_not_before() {
    let served = Served::with_space();
    let file = served.create(b"file\0", 0).unwrap();
    let filled = served.fill(file);
    served.ask(UNLINK, served.rootfs(), &[b"file\0"]).unwrap();
    // It is open, and known.
    let another = served.create(b"another\0", 0);
    let refused = another.map(|another| served.fill(another));
    assert!(refused.is_err() || refused.unwrap_or(0) < 32 << 10);
    let fields = [file.handle, 0, 0].map(u64::to_le_bytes).concat();
    served.ask(RELEASE, file.node, &[&fields]).unwrap();
    assert!(served.create(b"third\0", 0).is_err() || served.taken() <= 32 << 10);

    let forget = request(FORGET, 3, file.node, &1u64.to_le_bytes());
    assert!(served.driver.request(&forget, 4096).is_empty());
    let last = served.create(b"last\0", 0).unwrap();
    assert!(served.fill(last) >= filled - (64 << 10));
    assert!(served.taken() <= SPACE, "{} bytes", served.taken());
    served.end();
}

#[test]
fn a_file_that_another_mount_has_open_is_not_gone() {
    let served = Served::with_space();
    let file = served.create(b"file\0", 0).unwrap();
    let filled = served.fill(file);
    assert!(filled > SPACE / 2);
    let other = served.open(served.look_up(served.mount(), b"file\0"));
    assert_ne!(other.node, file.node);
    served.unlink(b"file\0");
    served.close(file);
    served.forget(file.node);
    assert!(!served.has_room());
    served.forget(other.node);
    assert!(!served.has_room());
    served.close(other);
    assert_eq!(served.process.removed_files(), 0);
    assert!(served.has_room());
    served.end();
}

#[test]
fn a_file_whose_first_handle_is_kept_is_not_gone() {
    let served = Served::with_space();
    let fields = [libc::O_RDWR.cast_unsigned(), 0o100_600, 0, 0];
    let body = [&fields.map(u32::to_le_bytes).concat(), b"none\0".as_slice()];
    let reply = served.ask(TMPFILE, served.rootfs(), &body).unwrap();
    let first = Open {
        node: node_in(&reply),
        handle: u64::from_le_bytes(reply[128..136].try_into().unwrap()),
    };
    served.ask(LINK, served.rootfs(), &[&first.node.to_le_bytes(), b"file\0"]).unwrap();
    // Opened by its name it is the library's.
    let second = served.open(first.node);
    assert!(served.fill(second) > SPACE / 2);
    served.close(second);
    served.unlink(b"file\0");
    served.forget(first.node);
    assert!(!served.has_room());
    served.close(first);
    assert_eq!(served.process.removed_files(), 0);
    assert!(served.has_room());
    served.end();
}

#[test]
fn a_file_that_is_found_and_can_not_be_opened_is_not_kept() {
    let served = Served::with_space();
    let file = served.create(b"file\0", 0).unwrap();
    served.fill(file);
    let fields = [(libc::O_RDWR | libc::O_DIRECTORY).cast_unsigned(), 0o100_600, 0, 0];
    let body = [&fields.map(u32::to_le_bytes).concat(), b"file\0".as_slice()];
    assert_eq!(served.ask(CREATE, served.mount(), &body), Err(libc::ENOTDIR));
    served.unlink(b"file\0");
    served.close(file);
    assert_eq!(served.process.removed_files(), 1);
    served.forget(file.node);
    assert_eq!(served.process.removed_files(), 0);
    assert!(served.has_room());
    served.end();
}

#[test]
fn directories_and_links_count_with_their_blocks() {
    let served = Served::with_space_on_disk();
    let target = [&[b't'; 500][..], b"\0"].concat();
    let mut made = 0;
    loop {
        let name = format!("link{made}\0");
        let link = served.ask(SYMLINK, served.rootfs(), &[name.as_bytes(), &target]);
        let directory = served.make_directory(&format!("directory{made}"));
        if let Err(errno) = link.and(directory) {
            assert_eq!(errno, libc::EDQUOT);
            break;
        }
        made += 1;
        assert!(made < 1000, "they have no end");
    }
    assert!(made > 16, "{made} of each");
    assert!(served.taken() <= SPACE, "{} bytes", served.taken());
    served.end();
}

#[test]
fn attributes_count_with_their_blocks() {
    let served = Served::with_space_on_disk();
    // More than fits into an inode, and in each file another.
    let mut value = [1; 300];
    let mut made = 0u16;
    loop {
        value[..2].copy_from_slice(&made.to_le_bytes());
        let length = (value.len() as u32).to_le_bytes();
        let body: [&[u8]; 4] = [&length, &[0; 12], b"user.x\0", &value];
        let created = served.create(format!("{made}\0").as_bytes(), 0);
        let set = created.and_then(|file| served.ask(SETXATTR, file.node, &body));
        if let Err(errno) = set {
            assert_eq!(errno, libc::EDQUOT);
            break;
        }
        made += 1;
        assert!(made < 1000, "they have no end");
    }
    assert!(made > 32, "{made} attributes");
    assert!(served.taken() <= SPACE, "{} bytes", served.taken());
    served.end();
}

#[test]
fn names_that_are_moved_count_where_they_make_a_directory_grow() {
    let served = Served::with_space_on_disk();
    let directories: Vec<u64> =
        (0..24).map(|n| served.make_directory(&n.to_string()).unwrap()).collect();
    let names: Vec<String> = (0..60).map(|n| format!("{n:0>250}\0")).collect();
    for name in &names {
        let file = served.create(name.as_bytes(), 0).unwrap();
        served.close(file);
    }
    let rename = |from: u64, to: u64, name: &String| {
        served.ask(RENAME, from, &[&to.to_le_bytes(), name.as_bytes(), name.as_bytes()]).map(drop)
    };
    let mut from = served.rootfs();
    'all: for to in directories {
        for name in &names {
            if let Err(errno) = rename(from, to, name) {
                assert_eq!(errno, libc::EDQUOT);
                break 'all;
            }
        }
        from = to;
    }
    // The last of them may have made a directory grow.
    assert!(served.taken() <= SPACE + (8 << 10), "{} bytes", served.taken());
    served.end();
}

#[test]
fn what_the_guest_did_not_add_is_not_the_guests_to_give_back() {
    let served = Served::with_space();
    let shared = served.directory.path().join("shared");
    fs::write(shared.join("before"), [1; 512 << 10]).unwrap();
    let before = served.taken();
    let file = served.create(b"file\0", 0).unwrap();
    served.fill(file);
    // It is cut, and removed.
    let cut = served.create(b"before\0", libc::O_TRUNC);
    assert!(cut.is_err() || fs::metadata(shared.join("before")).unwrap().len() == 0);
    served.ask(UNLINK, served.rootfs(), &[b"before\0"]).unwrap();
    served.fill(file);
    assert!(served.taken() <= SPACE && before >= 512 << 10, "{} bytes", served.taken());
    served.end();
}

#[test]
fn a_request_that_waits_holds_up_neither_a_reset_nor_the_end() {
    let a_byte = NonZeroU64::new(1);
    let mut served =
        Served::begin(FileLimits { bytes_per_second: a_byte, ..FileLimits::default() });
    // `FUSE_INIT` is to be paid for with minutes; this one waits.
    let driver = &served.driver;
    driver.set_available(driver.available().wrapping_add(1));
    driver.doorbell.write(1).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(driver.used().wrapping_add(1), driver.available());
    served.backend.reset();
    served.driver = Driver::activate(&mut served.backend);
    served.end();
}
