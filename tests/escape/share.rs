//! `kiln fs`, started as the monitor does it, with a share that is thrown away.

use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use kiln_vmm::config::{FileLimits, FsConfig, SharedTree, VmmEvent};
use nix::sys::resource::{Resource, setrlimit};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

use crate::process::{file_of, inherited};

/// The largest file that may be written, in bytes: a guest may ask for any.
const MAX_FILE: u64 = 1 << 20;

/// A process that serves a directory.
pub struct Share {
    process: Child,
    control: Option<OwnedFd>,
    errors: File,
    directory: tempfile::TempDir,
}

impl Share {
    /// Serves an empty `rootfs/`, beside which there is a file that nobody is to reach.
    pub fn start() -> (Self, UnixStream) {
        let directory = tempfile::tempdir_in("/dev/shm").expect("a directory");
        let path = |name: &str| directory.path().join(name);
        fs::create_dir(path("rootfs")).expect("made");
        fs::write(path("secret"), "secret").expect("written");
        let listener = UnixListener::bind(path("socket")).expect("bound");
        let connection = UnixStream::connect(path("socket")).expect("connected");
        let rootfs = File::options().read(true).custom_flags(libc::O_PATH).open(path("rootfs"));
        let rootfs = rootfs.expect("opened");
        let (control, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .expect("a socket pair");
        let config = FsConfig {
            id: "test".into(),
            socket: inherited(&listener),
            rootfs: SharedTree { source: inherited(&rootfs), read_only: false },
            mounts: Vec::new(),
            limits: FileLimits::default(),
            control: inherited(&theirs),
        };
        let config = file_of(&serde_json::to_vec(&config).expect("JSON"));
        let errors = tempfile::tempfile().expect("a file");
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .args(["fs", "--config-fd", &inherited(&config).0.to_string()])
            .stdin(Stdio::null())
            .stderr(errors.try_clone().expect("cloned"));
        // SAFETY: a system call.
        unsafe { command.pre_exec(|| Ok(setrlimit(Resource::RLIMIT_FSIZE, MAX_FILE, MAX_FILE)?)) };
        let process = command.spawn().expect("kiln starts");
        let share = Self { process, control: Some(control), errors, directory };
        assert_eq!(share.event(), Some(VmmEvent::Running));
        (share, connection)
    }

    fn event(&self) -> Option<VmmEvent> {
        let control = self.control.as_ref()?;
        let mut packet = vec![0; 1 << 16];
        let length = recv(control.as_raw_fd(), &mut packet, MsgFlags::empty()).expect("received");
        (length > 0).then(|| serde_json::from_slice(&packet[..length]).expect("an event"))
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// What it has logged.
    pub fn errors(&self) -> String {
        let mut text = Vec::new();
        let mut errors = self.errors.try_clone().expect("cloned");
        errors.rewind().expect("rewound");
        errors.read_to_end(&mut text).expect("read");
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for its end, which comes with its guest's, and looks whether it has kept to its share.
    pub fn end(mut self) {
        let status = self.process.wait().expect("ends");
        assert!(status.success(), "{status}: {}", self.errors());
        let path = |name: &str| self.directory.path().join(name);
        assert_eq!(fs::read(path("secret")).expect("there"), b"secret");
        let mut names: Vec<_> = fs::read_dir(self.directory.path())
            .expect("read")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        names.sort();
        assert_eq!(names, ["rootfs", "secret", "socket"]);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        // It ends with its control socket.
        self.control = None;
        let _ = self.process.wait();
    }
}
