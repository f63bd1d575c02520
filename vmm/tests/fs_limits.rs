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
    CREATE, FALLOCATE, FORGET, LOOKUP, MKDIR, RELEASE, SETXATTR, UNLINK, WRITE,
};
use fs_driver::{Driver, connect, error, init, request};
use fs_guest::FsProcess;
use kiln_vmm::config::FileLimits;
use kiln_vmm::transport::Backend;
use kiln_vmm::transport::vhost_user_frontend::VhostUserBackend;

const ROOT: u64 = 1;

const SPACE: u64 = 256 << 10;

/// A share with a limit, to a driver that has said `FUSE_INIT`.
struct Served {
    directory: tempfile::TempDir,
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
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let shared = directory.path().join("shared");
        fs::create_dir(&shared).unwrap();
        let limits = fs_guest::Limits { files, ..Default::default() };
        let process = FsProcess::start_limited(directory.path(), &shared, &[], limits);
        let mut backend = connect(&process.socket, || {});
        let driver = Driver::activate(&mut backend);
        assert_eq!(error(&driver.request(&init(), 4096)), 0);
        Self { directory, process, backend, driver }
    }

    fn with_space() -> Self {
        Self::begin(FileLimits { space: NonZeroU64::new(SPACE), ..FileLimits::default() })
    }

    fn rootfs(&self) -> u64 {
        let reply = self.ask(LOOKUP, ROOT, &[b"rootfs\0"]).unwrap();
        u64::from_le_bytes(reply[..8].try_into().unwrap())
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

fn taken(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
    entries.map(|entry| entry.metadata().unwrap().blocks() * 512).sum()
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
