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

use fs_driver::{Driver, connect, error, init, request};
use fs_guest::FsProcess;
use kiln_vmm::transport::Backend;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

const LOOKUP: u32 = 1;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RMDIR: u32 = 11;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const CREATE: u32 = 35;
const RENAME2: u32 = 45;
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
    let setting = Setting::new();
    let process = setting.serve();
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let rootfs = look_up(&driver, ROOT, b"rootfs\0").unwrap();
    let file = look_up(&driver, rootfs, b"file\0").unwrap();

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
    setting.check();
    backend.reset();
    drop(backend);
    process.wait();
}

#[test]
fn special_files_are_never_opened() {
    let setting = Setting::new();
    let process = setting.serve();
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let rootfs = look_up(&driver, ROOT, b"rootfs\0").unwrap();

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
        let node = look_up(&driver, rootfs, &[name.as_bytes(), b"\0"].concat()).unwrap();
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
    assert!(fs::symlink_metadata(setting.path("shared/fifo")).unwrap().file_type().is_fifo());
    setting.check();
    backend.reset();
    drop(backend);
    process.wait();
}

#[test]
fn offsets_past_any_file_are_refused() {
    let setting = Setting::new();
    let process = setting.serve();
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let rootfs = look_up(&driver, ROOT, b"rootfs\0").unwrap();
    let file = look_up(&driver, rootfs, b"file\0").unwrap();
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
    backend.reset();
    drop(backend);
    process.wait();
}

#[test]
fn buffers_that_are_not_in_memory_are_used_up_without_effect() {
    let setting = Setting::new();
    let process = setting.serve();
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let outside = 1 << 40;
    assert_eq!(driver.chain(&[(outside, 64, 1, 1), (0x20_0000, 64, 2, 0)]), 0);
    assert_eq!(driver.chain(&[(0x10_0000, 56, 1, 1), (outside, 64, 2, 0)]), 0);
    assert_eq!(driver.chain(&[(u64::MAX - 8, 64, 0, 0)]), 0);
    assert_eq!(driver.chain(&[(0x3f_fff0, 64, 0, 0)]), 0);
    // It goes on with what makes sense.
    assert!(look_up(&driver, ROOT, b"rootfs\0").is_ok());
    backend.reset();
    drop(backend);
    process.wait();
}

/// A part of a request's body.
fn piece() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![
        Just(0u64),
        1..20u64,
        Just(u64::MAX),
        Just(1 << 63),
        Just(1 << 48 | 2),
        Just(4096),
        Just(1 << 20),
        any::<u64>(),
    ];
    let name = prop_oneof![
        Just(b"file\0".to_vec()),
        Just(b"dir\0".to_vec()),
        Just(b"rootfs\0".to_vec()),
        Just(b"..\0".to_vec()),
        Just(b"../beside/secret\0".to_vec()),
        Just(b"user.x\0".to_vec()),
        Just(b"system.posix_acl_access\0".to_vec()),
        Just(vec![b'n'; 300]),
        proptest::collection::vec(any::<u8>(), 0..40),
    ];
    prop_oneof![
        number.clone().prop_map(|number| number.to_le_bytes().to_vec()),
        number.prop_map(|number| (number as u32).to_le_bytes().to_vec()),
        name,
    ]
}

/// A node id: one of the first that the guest gets to know, in any area, or any at all.
fn node() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 1..8u64,
        1 => (1..8u64).prop_map(|id| id | 1 << 63),
        1 => (1..8u64, 0..1u64 << 15).prop_map(|(id, area)| id | area << 48),
        1 => any::<u64>(),
    ]
}

#[derive(Debug, Clone)]
struct Hostile {
    bytes: Vec<u8>,
    room: u32,
}

fn hostile() -> impl Strategy<Value = Hostile> {
    // FUSE_INIT (26) and FUSE_DESTROY (38) would take the nodes away that others are to find.
    let opcode = prop_oneof![
        9 => (0..54u32).prop_filter("keeps the session", |opcode| ![26, 38].contains(opcode)),
        1 => any::<u32>(),
    ];
    let body = proptest::collection::vec(piece(), 0..8).prop_map(|pieces| pieces.concat());
    let length = prop_oneof![8 => Just(None), 1 => any::<u32>().prop_map(Some), 1 => (0..100u32).prop_map(Some)];
    let room = prop_oneof![6 => Just(8192u32), 1 => 0..200u32];
    (opcode, node(), body, length, room, owner(), owner()).prop_map(
        |(opcode, node, body, length, room, user, group)| {
            let mut bytes = request(opcode, 9, node, &body);
            if let Some(length) = length {
                bytes[..4].copy_from_slice(&length.to_le_bytes());
            }
            bytes[24..28].copy_from_slice(&user.to_le_bytes());
            bytes[28..32].copy_from_slice(&group.to_le_bytes());
            Hostile { bytes, room }
        },
    )
}

/// A user or a group.
fn owner() -> impl Strategy<Value = u32> {
    prop_oneof![4 => Just(0u32), 1 => Just(1000), 1 => any::<u32>()]
}

#[test]
fn any_bytes_get_an_answer_and_change_nothing_but_the_share() {
    let setting = Setting::new();
    let process = setting.serve();
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    let mut runner = TestRunner::new(Config { cases: 200, ..Config::default() });
    let requests = proptest::collection::vec(hostile(), 1..60);
    let outcome = runner.run(&requests, |requests| {
        // Makes the first node ids those of the share.
        prop_assert_eq!(error(&driver.request(&init(), 4096)), 0);
        if let Ok(rootfs) = look_up(&driver, ROOT, b"rootfs\0") {
            let _ = look_up(&driver, rootfs, b"file\0");
            let _ = look_up(&driver, rootfs, b"dir\0");
        }
        for Hostile { bytes, room } in &requests {
            let reply = driver.request(bytes, *room);
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
    // It still serves as it should.
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let rootfs = look_up(&driver, ROOT, b"rootfs\0").unwrap();
    let made = [0o755u32.to_le_bytes(), [0; 4]].concat();
    let body = [&made[..], b"after all\0"].concat();
    assert_eq!(error(&driver.request(&request(MKDIR, 10, rootfs, &body), 4096)), 0);
    let directory = fs::metadata(setting.path("shared/after all")).unwrap();
    assert_eq!((directory.uid(), directory.gid(), directory.mode() & 0o7777), (0, 0, 0o755));
    setting.check();
    backend.reset();
    drop(backend);
    process.wait();
}
