//! A shared tree behaves as a local file system, in a real guest and seen from the host.

#![allow(clippy::unwrap_used)]

mod fs_guest;

use std::fs::{self, File};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use fs_guest::{FsProcess, Guest, Limits, Mount, program};

/// The names of the checks in `lines` that passed; fails with all that didn't.
fn passed(lines: &[String], whose: &str) -> Vec<String> {
    let failed: Vec<_> = lines.iter().filter(|line| line.starts_with("FAIL")).collect();
    assert!(failed.is_empty(), "{whose}: {failed:#?}");
    lines.iter().filter_map(|line| line.strip_prefix("ok ")).map(str::to_owned).collect()
}

/// What the same program finds in a directory of the host.
fn reference(program: &Path) -> Vec<String> {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let output = Command::new(program).arg(directory.path()).output().unwrap();
    let lines: Vec<_> =
        String::from_utf8_lossy(&output.stdout).lines().map(str::to_owned).collect();
    passed(&lines, "the host")
}

#[test]
fn a_share_behaves_as_a_local_file_system() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| directory.path().join(name);
    for name in ["rootfs", "plain", "read-only"] {
        fs::create_dir(path(name)).unwrap();
    }
    fs::write(path("read-only/hello"), "hello\n").unwrap();
    fs::write(path("file"), "before").unwrap();
    fs::write(path("read-only-file"), "before").unwrap();
    File::create(path("rootfs/same")).unwrap();
    fs::hard_link(path("rootfs/same"), path("plain/same")).unwrap();
    let mounts = [("plain", false), ("read-only", true), ("file", false), ("read-only-file", true)]
        .map(|(name, read_only)| Mount { source: path(name), read_only });

    let program = program(directory.path());
    let backend = FsProcess::start(directory.path(), &path("rootfs"), &mounts);
    let guest = Guest::boot(directory.path(), &program, &backend.socket, "check");
    let lines = guest.run(|line| {
        if line == "waiting" {
            File::create(path("plain/signal")).unwrap();
        }
    });
    backend.wait();

    let mut expected = reference(&program);
    expected.extend(["mounts", "host_file_shows", "leave"].map(str::to_owned));
    assert_eq!(passed(&lines, "the guest"), expected);
    assert!(path("plain/made").is_file());
    assert_eq!(fs::read(path("file")).unwrap(), b"changed");
    what_was_left_is_right(&path("rootfs/left"));
}

/// Looks at the files that the guest left with the host's eyes.
fn what_was_left_is_right(left: &Path) {
    // The mode is the ACL's, which was set last; the set-id bit is that of the chmod before.
    let file = fs::symlink_metadata(left.join("file")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777), (1234, 4321, 0o4660));
    assert_eq!((file.mtime(), file.mtime_nsec()), (1_222_222_222, 22));
    assert_eq!((file.atime(), file.atime_nsec()), (1_111_111_111, 11));
    let second = fs::symlink_metadata(left.join("second")).unwrap();
    assert_eq!((file.nlink(), file.ino()), (2, second.ino()));
    let mut value = [0; 64];
    let length = rustix::fs::getxattr(left.join("file"), "user.kiln", &mut value).unwrap();
    assert_eq!(&value[..length], b"value");
    let acl = rustix::fs::getxattr(left.join("file"), "system.posix_acl_access", &mut value);
    assert_eq!(acl, Ok(44));
    assert_eq!(fs::read(left.join("second")).unwrap(), b"from the guest");

    let sparse = fs::symlink_metadata(left.join("sparse")).unwrap();
    assert_eq!(sparse.len(), 1 << 32);
    assert!(sparse.blocks() < 1000, "{} blocks", sparse.blocks());

    let device = fs::symlink_metadata(left.join("device")).unwrap();
    assert!(device.file_type().is_block_device());
    assert_eq!(device.rdev(), rustix::fs::makedev(259, 7));
    let fifo = fs::symlink_metadata(left.join("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo() && fifo.mode() & 0o7777 == 0o622);
    assert_eq!(fs::read_link(left.join("link")).unwrap(), Path::new("/etc/passwd"));
    assert_eq!(fs::symlink_metadata(left.join("dir")).unwrap().mode() & 0o7777, 0o1771);
}

#[test]
fn files_beyond_the_limit_of_open_ones_wait_until_others_are_forgotten() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let rootfs = directory.path().join("rootfs");
    for outer in 0..100 {
        let inner = rootfs.join(outer.to_string());
        fs::create_dir_all(&inner).unwrap();
        for file in 0..100 {
            File::create(inner.join(file.to_string())).unwrap();
        }
    }
    let program = program(directory.path());
    let limits = Limits { open_files: Some(1024), ..Limits::default() };
    let backend = FsProcess::start_limited(directory.path(), &rootfs, &[], limits);
    let guest = Guest::boot(directory.path(), &program, &backend.socket, "beyond-limit");
    let lines = guest.run(|_| {});
    backend.wait();
    assert_eq!(passed(&lines, "the guest"), ["beyond_limit", "forget"]);
}
