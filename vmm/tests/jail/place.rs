//! What lies around a jail: a share with something beside it, listening sockets, the parent.

use std::ffi::CString;
use std::fmt::Write as _;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};

/// The largest handle: `MAX_HANDLE_SZ` of `include/linux/exportfs.h`.
const MAX_HANDLE: usize = 128;

/// Something of the host's to reach for.
pub struct Place {
    directory: tempfile::TempDir,
    tcp: TcpListener,
    name: String,
    _unix: UnixListener,
}

impl Place {
    /// On a file system that has file handles.
    pub fn new() -> Self {
        let directory = tempfile::tempdir_in("/dev/shm").unwrap();
        std::fs::create_dir(directory.path().join("share")).unwrap();
        std::fs::write(directory.path().join("secret"), "secret").unwrap();
        let link = directory.path().join("share/link");
        std::os::unix::fs::symlink("../secret", link).unwrap();
        let tcp = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let name = directory.path().display().to_string();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let unix = UnixListener::bind_addr(&address).unwrap();
        Self { directory, tcp, name, _unix: unix }
    }

    /// Where it is all found.
    pub fn environment(&self) -> [(&'static str, String); 5] {
        let share = self.directory.path().join("share");
        [
            ("SHARE", share.to_str().unwrap().to_owned()),
            ("HANDLE", handle_of(&self.directory.path().join("secret"))),
            ("LISTENER", self.tcp.local_addr().unwrap().port().to_string()),
            ("ABSTRACT", self.name.clone()),
            ("PARENT", std::process::id().to_string()),
        ]
    }
}

/// The directory that the inmate is to share.
pub fn share() -> PathBuf {
    std::env::var_os("SHARE").unwrap().into()
}

/// A file's handle as the kernel writes it, in hexadecimal digits.
fn handle_of(path: &Path) -> String {
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut handle = [0u8; 8 + MAX_HANDLE];
    handle[..4].copy_from_slice(&(MAX_HANDLE as u32).to_ne_bytes());
    let mut mount = 0i32;
    // SAFETY: the handle has the room that its first field says, and both outlive the call.
    let made = unsafe {
        let (path, handle) = (path.as_ptr(), handle.as_mut_ptr());
        libc::syscall(libc::SYS_name_to_handle_at, libc::AT_FDCWD, path, handle, &raw mut mount, 0)
    };
    assert_eq!(made, 0, "{}", std::io::Error::last_os_error());
    handle.iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}
