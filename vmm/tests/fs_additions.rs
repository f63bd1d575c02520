//! Trees that are added to a share while it is served, and taken away again.

#![allow(clippy::unwrap_used)]

mod fs_driver;
mod fs_guest;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use fs_driver::opcode::{LOOKUP, MKDIR};
use fs_driver::{Driver, connect, error, init, request};
use fs_guest::FsProcess;
use kiln_vmm::transport::Backend;
use kiln_vmm::virtio::fs::{Place, Served, Share, ShareOptions, TreeError};

const ROOT: u64 = 1;

/// Looks a name up; the node id, or the error.
fn look_up(driver: &Driver, parent: u64, name: &str) -> Result<u64, i32> {
    let name = [name.as_bytes(), b"\0"].concat();
    let reply = driver.request(&request(LOOKUP, 2, parent, &name), 4096);
    match error(&reply) {
        0 => Ok(u64::from_le_bytes(reply[16..24].try_into().unwrap())),
        errno => Err(errno),
    }
}

/// Makes a directory; the error, 0 for none.
fn make(driver: &Driver, parent: u64, name: &str) -> i32 {
    let body = [&0o755u32.to_le_bytes()[..], &[0; 4], name.as_bytes(), b"\0"].concat();
    error(&driver.request(&request(MKDIR, 2, parent, &body), 4096))
}

fn share(path: &Path, place: Place, read_only: bool) -> Share {
    let file = File::options().read(true).custom_flags(libc::O_PATH).open(path).unwrap();
    Share::new(file.as_fd(), place, ShareOptions { read_only, recursive: true }).unwrap()
}

/// Does something to the tree of a process, in a thread that ends afterwards.
fn change<T: Send>(process: &FsProcess, action: impl FnOnce(&Served) -> T + Send) -> T {
    let served = Served::by(process.pidfd());
    std::thread::scope(|scope| scope.spawn(|| action(&served)).join().unwrap())
}

#[test]
fn additions_come_and_go_and_places_are_free_again() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path();
    for name in ["shared", "one", "two"] {
        fs::create_dir(path.join(name)).unwrap();
        fs::write(path.join(name).join(format!("in {name}")), "contents").unwrap();
    }
    let process = FsProcess::start(path, &path.join("shared"), &[]);
    let mut backend = connect(&process.socket, || {});
    let driver = Driver::activate(&mut backend);
    assert_eq!(error(&driver.request(&init(), 4096)), 0);
    let containers = look_up(&driver, ROOT, "containers").unwrap();
    let volumes = look_up(&driver, ROOT, "volumes").unwrap();
    assert_eq!(look_up(&driver, containers, "5"), Err(libc::ENOENT));

    let (container, volume) =
        (Place::Container { number: 5 }, Place::Volume { number: 5, is_file: false });
    let file = Place::Volume { number: 6, is_file: true };
    let shares = [
        share(&path.join("one"), container, false),
        share(&path.join("two"), volume, true),
        share(&path.join("two/in two"), file, false),
    ];
    change(&process, |served| served.attach(&shares)).unwrap();
    let one = look_up(&driver, containers, "5").unwrap();
    let two = look_up(&driver, volumes, "5").unwrap();
    look_up(&driver, one, "in one").unwrap();
    look_up(&driver, two, "in two").unwrap();
    look_up(&driver, volumes, "6").unwrap();
    assert_eq!(make(&driver, one, "new"), 0);
    assert!(path.join("one/new").is_dir());
    assert_eq!(make(&driver, two, "new"), libc::EROFS);
    for parent in [containers, volumes] {
        assert_eq!(make(&driver, parent, "7"), libc::EROFS);
    }

    let free = Place::Container { number: 8 };
    let taken = [share(&path.join("one"), free, false), share(&path.join("two"), container, false)];
    let refused = change(&process, |served| served.attach(&taken));
    assert!(matches!(refused, Err(TreeError::TwiceThePlace(_))), "{refused:?}");
    assert_eq!(look_up(&driver, containers, "8"), Err(libc::ENOENT));

    change(&process, |served| served.detach(&[container, volume, file])).unwrap();
    for parent in [containers, volumes] {
        assert_eq!(look_up(&driver, parent, "5"), Err(libc::ENOENT));
    }
    let again = [share(&path.join("two"), container, false)];
    change(&process, |served| served.attach(&again)).unwrap();
    let two = look_up(&driver, containers, "5").unwrap();
    look_up(&driver, two, "in two").unwrap();

    backend.reset();
    drop(backend);
    process.wait();
}
