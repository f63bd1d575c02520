//! The guarded file system over the library's, on a directory of the host.

use virtiofsd::filesystem::{Extensions, FsOptions};
use virtiofsd::fuse::ROOT_ID;
use virtiofsd::soft_idmap::{GuestGid, GuestUid};

use super::*;
use crate::virtio::fs::file_system_at;

const LIMIT: u64 = 1 << 20;

fn context() -> Context {
    Context { uid: GuestUid::from(0), gid: GuestGid::from(0), pid: 1 }
}

struct Served {
    file_system: GuardedFs,
    _directory: tempfile::TempDir,
}

impl Served {
    fn with_open_files(open_files: u64) -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        let root = directory.path().to_str().unwrap();
        let space = Space::new(LIMIT, Box::new(|| ()));
        let fd_directory = File::open("/proc/self/fd").unwrap();
        let file_system = file_system_at(root, fd_directory, open_files, Some(space)).unwrap();
        file_system.init(FsOptions::all()).unwrap();
        Self { file_system, _directory: directory }
    }

    fn space(&self) -> &Space {
        self.file_system.space.as_ref().unwrap()
    }

    fn make_nameless(&self) -> (u64, u64) {
        let request = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
        let made = self.file_system.make_nameless(context(), ROOT_ID, &request);
        let (entry, handle, _) = made.unwrap();
        (entry.inode, handle)
    }
}

#[test]
fn nameless_files_leave_the_ledger_with_their_handles() {
    let served = Served::with_open_files(256);
    let file_system = &served.file_system;
    for forget_first in [true, false] {
        let (node, handle) = served.make_nameless();
        assert_eq!(served.space().known_nodes(), 1);
        let (other, _) = file_system.open(context(), node, false, 0).unwrap();
        if forget_first {
            file_system.forget(context(), node, 1);
        }
        for handle in [handle, other.unwrap()] {
            assert!(served.space().room() < LIMIT);
            file_system.release(context(), node, 0, handle, false, false, None).unwrap();
        }
        file_system.forget(context(), node, 1);
        assert_eq!((served.space().known_nodes(), served.space().room()), (0, LIMIT));
    }
}

#[test]
fn what_is_made_and_can_not_be_told_of_is_counted() {
    let served = Served::with_open_files(16);
    let make = |name: &CStr| {
        let extensions = Extensions::default();
        served.file_system.mkdir(context(), ROOT_ID, name, 0o700, 0, extensions).map(drop)
    };
    let mut names = (0..).map(|n: u32| std::ffi::CString::new(n.to_string()).unwrap());
    let error = names.find_map(|name| make(&name).err()).unwrap();
    assert_eq!(error.raw_os_error(), Some(libc::ENFILE));
    let room = served.space().room();
    make(c"one").unwrap_err();
    assert!(served.space().room() <= room - space::INODE);
    // It is there by now.
    let room = served.space().room();
    assert_eq!(make(c"one").unwrap_err().raw_os_error(), Some(libc::EEXIST));
    assert_eq!(served.space().room(), room);
}
