//! What a guest that keeps to no rule can do to the fs backend process: nothing.
//!
//! Each request goes to the real process, confined as it always is, so that a panic, an abort or a
//! system call that its filter forbids ends it and is seen.

#![allow(clippy::unwrap_used)]

mod fs_driver;
mod fs_guest;

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use fs_driver::opcode::{
    BATCH_FORGET, CREATE, FORGET, LINK, LOOKUP, MKDIR, MKNOD, OPEN, READ, RENAME, RENAME2, RMDIR,
    SYMLINK, TMPFILE, UNLINK, WRITE,
};
use fs_driver::{Driver, REQUEST_AT, connect, error, init, request};
use fs_guest::FsProcess;
use kiln_vmm::transport::Backend;
use kiln_vmm::transport::vhost_user_frontend::VhostUserBackend;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use vm_memory::{Bytes, GuestAddress};

const ROOT: u64 = 1;

/// The largest file that the process may write in these tests, in bytes: a guest could ask it to
/// allocate whatever the file system holds.
const MAX_FILE: u64 = 1 << 20;

/// A directory with `shared/` and, beside it, what must stay as it is.
struct Setting {
    directory: tempfile::TempDir,
}

impl Setting {
    fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = directory.path();
        for name in ["shared", "beside", "shared/dir"] {
            fs::create_dir(path.join(name)).unwrap();
        }
        fs::write(path.join("beside/secret"), "secret").unwrap();
        fs::write(path.join("shared/file"), "contents").unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.directory.path().join(name)
    }

    fn serve(&self) -> FsProcess {
        let limits = fs_guest::Limits { file_size: Some(MAX_FILE), ..Default::default() };
        FsProcess::start_limited(self.directory.path(), &self.path("shared"), &[], limits)
    }

    /// Fails if anything but the share has changed.
    fn check(&self) {
        let names = |path: &Path| {
            let entries = fs::read_dir(path).unwrap();
            let mut names: Vec<_> =
                entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(self.directory.path()), ["beside", "fs.sock", "shared"]);
        assert_eq!(names(&self.path("beside")), ["secret"]);
        assert_eq!(fs::read(self.path("beside/secret")).unwrap(), b"secret");
        let secret = fs::metadata(self.path("beside/secret")).unwrap();
        assert_eq!((secret.nlink(), secret.uid()), (1, 0));
    }
}

/// A setting that is served, to a driver that has said `FUSE_INIT`.
struct Served {
    setting: Setting,
    process: FsProcess,
    backend: VhostUserBackend,
    driver: Driver,
}

impl Served {
    fn begin() -> Self {
        let setting = Setting::new();
        let process = setting.serve();
        let mut backend = connect(&process.socket, || {});
        let driver = Driver::activate(&mut backend);
        assert_eq!(error(&driver.request(&init(), 4096)), 0);
        Self { setting, process, backend, driver }
    }

    /// Fails if anything but the share has changed, or the process doesn't end as it should.
    fn end(mut self) {
        self.setting.check();
        self.backend.reset();
        drop(self.backend);
        self.process.wait();
    }
}

/// Looks a name up; the node id, or the error.
fn look_up(driver: &Driver, parent: u64, name: &[u8]) -> Result<u64, i32> {
    let reply = driver.request(&request(LOOKUP, 2, parent, name), 4096);
    match error(&reply) {
        0 => Ok(u64::from_le_bytes(reply[16..24].try_into().unwrap())),
        errno => Err(errno),
    }
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let served = Served::begin();
    let driver = &served.driver;
    let rootfs = look_up(driver, ROOT, b"rootfs\0").unwrap();
    let file = look_up(driver, rootfs, b"file\0").unwrap();

    let zeroes = |count: usize| vec![0u8; count];
    for name in ["..", ".", "", "../x", "dir/x", "/etc/passwd", "dir/", "../beside/secret"] {
        let mut terminated = name.as_bytes().to_vec();
        terminated.push(0);
        let two = |first: &[u8]| [zeroes(first.len()), terminated.clone()].concat();
        let good_then_bad = [b"file\0", &terminated[..]].concat();
        let bad_then_good = [&terminated[..], b"file\0"].concat();
        let directory = rootfs.to_le_bytes();
        let rename = |names: &[u8]| [&directory[..], names].concat();
        let rename2 = |names: &[u8]| [&directory[..], &zeroes(8), names].concat();
        let hostile = [
            (LOOKUP, terminated.clone()),
            (SYMLINK, bad_then_good.clone()),
            (MKNOD, two(&zeroes(16))),
            (MKDIR, two(&zeroes(8))),
            (UNLINK, terminated.clone()),
            (RMDIR, terminated.clone()),
            (RENAME, rename(&good_then_bad)),
            (RENAME, rename(&bad_then_good)),
            (RENAME2, rename2(&good_then_bad)),
            (RENAME2, rename2(&bad_then_good)),
            (LINK, [&file.to_le_bytes()[..], &terminated].concat()),
            (CREATE, two(&zeroes(16))),
        ];
        for (opcode, body) in hostile {
            let reply = driver.request(&request(opcode, 3, rootfs, &body), 4096);
            assert_eq!(error(&reply), libc::EINVAL, "opcode {opcode}, name {name:?}");
        }
    }
    served.end();
}

#[test]
fn special_files_are_never_opened() {
    let served = Served::begin();
    let driver = &served.driver;
    let rootfs = look_up(driver, ROOT, b"rootfs\0").unwrap();

    // A null device, a disk and a FIFO, opening which would block for ever.
    for (name, mode, rdev) in
        [("null", 0o20_666u32, 0x103u32), ("disk", 0o60_666, 0x800), ("fifo", 0o10_666, 0)]
    {
        let mut body = Vec::new();
        for field in [mode, rdev, 0, 0] {
            body.extend(field.to_le_bytes());
        }
        body.extend(name.as_bytes());
        body.push(0);
        assert_eq!(error(&driver.request(&request(MKNOD, 4, rootfs, &body), 4096)), 0, "{name}");
        let node = look_up(driver, rootfs, &[name.as_bytes(), b"\0"].concat()).unwrap();
        for flags in [libc::O_RDONLY, libc::O_RDWR, libc::O_RDWR | libc::O_NONBLOCK] {
            let body = [flags.cast_unsigned().to_le_bytes(), [0; 4]].concat();
            let reply = driver.request(&request(OPEN, 5, node, &body), 4096);
            assert_eq!(error(&reply), libc::EBADF, "{name}");
        }
        // An open by way of a create that finds it.
        let mut body = Vec::new();
        for field in [libc::O_RDWR.cast_unsigned(), 0o100_600, 0, 0] {
            body.extend(field.to_le_bytes());
        }
        body.extend(name.as_bytes());
        body.push(0);
        let reply = driver.request(&request(CREATE, 6, rootfs, &body), 4096);
        assert_eq!(error(&reply), libc::EBADF, "{name}");
    }
    assert!(
        fs::symlink_metadata(served.setting.path("shared/fifo")).unwrap().file_type().is_fifo()
    );
    served.end();
}

#[test]
fn offsets_past_any_file_are_refused() {
    let served = Served::begin();
    let driver = &served.driver;
    let rootfs = look_up(driver, ROOT, b"rootfs\0").unwrap();
    let file = look_up(driver, rootfs, b"file\0").unwrap();
    let body = [libc::O_RDWR.cast_unsigned().to_le_bytes(), [0; 4]].concat();
    let opened = driver.request(&request(OPEN, 5, file, &body), 4096);
    assert_eq!(error(&opened), 0);
    let handle = &opened[16..24];
    for offset in [1u64 << 63, u64::MAX, (1 << 63) - 1] {
        // handle, offset, size, flags, lock owner, flags, padding
        let body = [handle, &offset.to_le_bytes(), &8u32.to_le_bytes(), &[0; 20]].concat();
        let reply = driver.request(&request(READ, 6, file, &body), 4096);
        assert_eq!(error(&reply), libc::EINVAL);
        let body = [&body[..], b"contents"].concat();
        let reply = driver.request(&request(WRITE, 7, file, &body), 4096);
        assert_eq!(error(&reply), libc::EINVAL);
    }
    served.end();
}

#[test]
fn buffers_that_are_not_in_memory_are_used_up_without_effect() {
    let served = Served::begin();
    let driver = &served.driver;
    let outside = 1 << 40;
    assert_eq!(driver.chain(&[(outside, 64, 1, 1), (0x20_0000, 64, 2, 0)]), 0);
    assert_eq!(driver.chain(&[(0x10_0000, 56, 1, 1), (outside, 64, 2, 0)]), 0);
    assert_eq!(driver.chain(&[(u64::MAX - 8, 64, 0, 0)]), 0);
    assert_eq!(driver.chain(&[(0x3f_fff0, 64, 0, 0)]), 0);
    // It goes on with what makes sense.
    assert!(look_up(driver, ROOT, b"rootfs\0").is_ok());
    served.end();
}

#[test]
fn what_is_forgotten_needs_no_room_for_a_reply() {
    let served = Served::begin();
    let driver = &served.driver;
    let rootfs = look_up(driver, ROOT, b"rootfs\0").unwrap();
    let open = |node| error(&driver.request(&request(OPEN, 3, node, &[0; 8]), 4096));
    let one = |node: u64| [node.to_le_bytes(), 1u64.to_le_bytes()].concat();
    let batch = |node| [&1u64.to_le_bytes()[..], &one(node)].concat();
    for (opcode, name, body) in [
        (FORGET, &b"file\0"[..], &(|_| 1u64.to_le_bytes().to_vec()) as &dyn Fn(u64) -> Vec<u8>),
        (BATCH_FORGET, b"dir\0", &batch),
    ] {
        let node = look_up(driver, rootfs, name).unwrap();
        assert!(driver.request(&request(opcode, 3, node, &body(node)), 0).is_empty());
        assert_ne!(open(node), 0, "{opcode} forgets");
    }
    // More nodes than the request has, and none.
    let body = [&u64::MAX.to_le_bytes()[..], &one(rootfs)].concat();
    assert!(driver.request(&request(BATCH_FORGET, 3, 0, &body), 0).is_empty());
    assert!(driver.request(&request(BATCH_FORGET, 3, 0, &[]), 0).is_empty());
    served.end();
}

#[test]
fn requests_that_become_others_while_they_are_read_do_no_harm() {
    let served = Served::begin();
    let driver = &served.driver;
    let memory = driver.memory.clone();
    let over = Arc::new(AtomicBool::new(false));
    let until = over.clone();
    let other_processor = std::thread::spawn(move || {
        while !until.load(Ordering::Relaxed) {
            for opcode in [READ, FORGET] {
                memory.write_obj(opcode, GuestAddress(REQUEST_AT + 4)).unwrap();
            }
        }
    });
    // Without room for a reply's header, of which only the first has no need.
    for _ in 0..2000 {
        driver.request(&request(FORGET, 3, ROOT, &[0; 40]), 8);
    }
    over.store(true, Ordering::Relaxed);
    other_processor.join().unwrap();
    assert!(look_up(driver, ROOT, b"rootfs\0").is_ok());
    served.end();
}

/// A number in a request.
#[derive(Debug, Clone, Copy)]
enum Number {
    Raw(u64),
    /// A node id that the guest knows, by its place in [`Session::nodes`].
    Node(prop::sample::Index),
    /// The handle of an open file.
    Handle,
}

/// What a guest knows after its first few requests.
struct Session {
    nodes: Vec<u64>,
    handle: u64,
}

impl Session {
    fn begin(driver: &Driver) -> Self {
        assert_eq!(error(&driver.request(&init(), 4096)), 0);
        let mut nodes = vec![ROOT];
        let mut handle = 0;
        // What came before may have removed any of these.
        if let Ok(rootfs) = look_up(driver, ROOT, b"rootfs\0") {
            nodes.push(rootfs);
            nodes.extend(look_up(driver, rootfs, b"dir\0"));
            let flags = libc::O_RDWR | libc::O_CREAT;
            let mut body = Vec::new();
            for field in [flags.cast_unsigned(), 0o100_600, 0, 0] {
                body.extend(field.to_le_bytes());
            }
            let nameless = driver.request(&request(TMPFILE, 2, rootfs, &body), 4096);
            body.extend(b"file\0");
            let file = driver.request(&request(CREATE, 2, rootfs, &body), 4096);
            for reply in [nameless, file] {
                if error(&reply) == 0 {
                    nodes.push(u64::from_le_bytes(reply[16..24].try_into().unwrap()));
                    handle = u64::from_le_bytes(reply[144..152].try_into().unwrap());
                }
            }
        }
        Self { nodes, handle }
    }

    fn resolve(&self, number: Number) -> u64 {
        match number {
            Number::Raw(raw) => raw,
            Number::Node(index) => *index.get(&self.nodes),
            Number::Handle => self.handle,
        }
    }
}

/// A request whose numbers are yet to be resolved.
#[derive(Debug, Clone)]
struct Hostile {
    opcode: u32,
    node: Number,
    numbers: Vec<Number>,
    half: Option<u32>,
    names: Vec<Vec<u8>>,
    length: Option<u32>,
    owner: (u32, u32),
    room: u32,
}

impl Hostile {
    fn bytes(&self, session: &Session) -> Vec<u8> {
        let numbers = self.numbers.iter().map(|number| session.resolve(*number));
        let mut body: Vec<u8> = numbers.flat_map(u64::to_le_bytes).collect();
        body.extend(self.half.iter().flat_map(|half| half.to_le_bytes()));
        body.extend(self.names.concat());
        let mut bytes = request(self.opcode, 9, session.resolve(self.node), &body);
        if let Some(length) = self.length {
            bytes[..4].copy_from_slice(&length.to_le_bytes());
        }
        bytes[24..28].copy_from_slice(&self.owner.0.to_le_bytes());
        bytes[28..32].copy_from_slice(&self.owner.1.to_le_bytes());
        bytes
    }
}

fn number() -> impl Strategy<Value = Number> {
    prop_oneof![
        4 => Just(Number::Raw(0)),
        4 => Just(Number::Handle),
        2 => any::<prop::sample::Index>().prop_map(Number::Node),
        2 => (1..70_000u64).prop_map(Number::Raw),
        2 => prop::sample::select(vec![u64::MAX, 1 << 63, (1 << 63) - 1, 1 << 32, 1 << 48 | 2])
            .prop_map(Number::Raw),
        1 => any::<u64>().prop_map(Number::Raw),
    ]
}

fn name() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        3 => Just(b"file\0".to_vec()),
        1 => Just(b"dir\0".to_vec()),
        1 => Just(b"..\0".to_vec()),
        1 => Just(b"../escaped\0".to_vec()),
        1 => Just(b"../../beside/secret\0".to_vec()),
        1 => Just(b"user.x\0".to_vec()),
        1 => Just(b"system.posix_acl_access\0".to_vec()),
        1 => Just(vec![b'n'; 300]),
        1 => proptest::collection::vec(any::<u8>(), 0..40),
    ]
}

fn owner() -> impl Strategy<Value = u32> {
    prop_oneof![4 => Just(0u32), 1 => Just(1000), 1 => any::<u32>()]
}

fn hostile() -> impl Strategy<Value = Hostile> {
    // FUSE_INIT (26) and FUSE_DESTROY (38) would take the nodes away that others are to find.
    let opcode = prop_oneof![
        19 => (0..54u32).prop_filter("keeps the session", |opcode| ![26, 38].contains(opcode)),
        1 => any::<u32>(),
    ];
    // A node id: one that is known, likewise in another area, or any at all.
    let node = prop_oneof![
        8 => any::<prop::sample::Index>().prop_map(Number::Node),
        1 => (1..8u64, 0..1u64 << 15).prop_map(|(id, area)| Number::Raw(id | area << 48)),
        1 => any::<u64>().prop_map(Number::Raw),
    ];
    let numbers = proptest::collection::vec(number(), 0..8);
    let half = proptest::option::weighted(0.2, any::<u32>());
    let names = proptest::collection::vec(name(), 0..3);
    let length = prop_oneof![
        18 => Just(None),
        1 => any::<u32>().prop_map(Some),
        1 => (0..100u32).prop_map(Some)
    ];
    let room = prop_oneof![6 => Just(8192u32), 1 => 0..200u32];
    let owner = (owner(), owner());
    (opcode, node, numbers, half, names, length, owner, room).prop_map(
        |(opcode, node, numbers, half, names, length, owner, room)| Hostile {
            opcode,
            node,
            numbers,
            half,
            names,
            length,
            owner,
            room,
        },
    )
}

#[test]
fn any_bytes_get_an_answer_and_change_nothing_but_the_share() {
    let served = Served::begin();
    let driver = &served.driver;
    let mut runner = TestRunner::new(Config { cases: 300, ..Config::default() });
    let requests = proptest::collection::vec(hostile(), 1..60);
    let outcome = runner.run(&requests, |requests| {
        let session = Session::begin(driver);
        for hostile in &requests {
            let reply = driver.request(&hostile.bytes(&session), hostile.room);
            if reply.is_empty() {
                continue;
            }
            let length = u32::from_le_bytes(reply[..4].try_into().unwrap());
            prop_assert_eq!(length as usize, reply.len());
            prop_assert_eq!(&reply[8..16], &9u64.to_le_bytes());
            prop_assert!((0..4096).contains(&error(&reply)));
        }
        Ok(())
    });
    outcome.unwrap();
    // It still serves as it should, and its threads are nobody but themselves again. (What requests
    // have made of the share's own mode and ACLs is theirs.)
    let fresh = served.setting.path("beside/fresh");
    fs::create_dir(&fresh).unwrap();
    fs::rename(&fresh, served.setting.path("shared/fresh")).unwrap();
    for _ in 0..20 {
        assert_eq!(error(&driver.request(&init(), 4096)), 0);
        let rootfs = look_up(driver, ROOT, b"rootfs\0").unwrap();
        let fresh = look_up(driver, rootfs, b"fresh\0").unwrap();
        let made = [0o755u32.to_le_bytes(), [0; 4]].concat();
        let body = [&made[..], b"after all\0"].concat();
        assert_eq!(error(&driver.request(&request(MKDIR, 10, fresh, &body), 4096)), 0);
        let path = served.setting.path("shared/fresh/after all");
        let directory = fs::metadata(&path).unwrap();
        assert_eq!((directory.uid(), directory.gid(), directory.mode() & 0o7777), (0, 0, 0o755));
        fs::remove_dir(path).unwrap();
    }
    served.end();
}
