//! A guest under QEMU's software CPU whose only files are those that an fs backend shares.

// Each test binary uses its own part.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used)]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use kiln_vmm::config::{FileLimits, FsConfig, InheritedFd, SharedMount, SharedTree};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use rustix::net::{AddressFamily, RecvFlags, SocketFlags, SocketType, recv, socketpair};
use rustix::process::{Resource, Rlimit, setrlimit};

/// How long a guest may take for all it does before the test gives up on it.
const PATIENCE: Duration = Duration::from_secs(240);

/// A bind mount to share.
pub struct Mount {
    pub source: PathBuf,
    pub read_only: bool,
}

/// Limits that the process starts with.
#[derive(Default)]
pub struct Limits {
    pub open_files: Option<u64>,
    /// In bytes.
    pub file_size: Option<u64>,
    /// What the process itself keeps.
    pub files: FileLimits,
}

/// The fs backend, in a process of its own.
pub struct FsProcess {
    pid: Pid,
    control: Option<OwnedFd>,
    pub socket: PathBuf,
}

fn o_path(path: &Path) -> OwnedFd {
    let file = File::options().read(true).custom_flags(libc::O_PATH).open(path);
    file.unwrap_or_else(|error| panic!("{}: {error}", path.display())).into()
}

impl FsProcess {
    /// Serves `rootfs` and `mounts` on a socket in `directory`.
    pub fn start(directory: &Path, rootfs: &Path, mounts: &[Mount]) -> Self {
        Self::start_limited(directory, rootfs, mounts, Limits::default())
    }

    /// Likewise, within limits.
    pub fn start_limited(
        directory: &Path,
        rootfs: &Path,
        mounts: &[Mount],
        limits: Limits,
    ) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "an fs backend needs root: run this test as root"
        );
        let path = directory.join("fs.sock");
        let socket = UnixListener::bind(&path).unwrap();
        let rootfs = o_path(rootfs);
        let sources: Vec<OwnedFd> = mounts.iter().map(|mount| o_path(&mount.source)).collect();
        let (control, backend_control) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let inherited = |fd: &OwnedFd| InheritedFd(fd.as_raw_fd());
        let config = FsConfig {
            id: "test".to_owned(),
            socket: InheritedFd(socket.as_raw_fd()),
            rootfs: SharedTree { source: inherited(&rootfs), read_only: false },
            mounts: std::iter::zip(mounts, &sources)
                .enumerate()
                .map(|(index, (mount, source))| SharedMount {
                    index: index.try_into().unwrap(),
                    source: inherited(source),
                    is_mount: false,
                    read_only: mount.read_only,
                    is_file: mount.source.is_file(),
                    recursive: true,
                })
                .collect(),
            limits: limits.files,
            control: inherited(&backend_control),
        };
        // SAFETY: the child is a single thread that goes on with what it got at the fork and leaves
        // by `_exit`; glibc keeps its allocator usable across a fork.
        let pid = match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => child,
            ForkResult::Child => serve(config, control, limits),
        };
        let mut event = [0; 4096];
        let length = rustix::io::read(&control, &mut event).unwrap();
        assert_eq!(&event[..length], b"\"running\"", "the fs backend did not come up");
        Self { pid, control: Some(control), socket: path }
    }

    /// What it has told its monitor since it came up.
    pub fn told(&self) -> String {
        let mut packets = String::new();
        let mut packet = [0; 4096];
        let control = self.control.as_ref().expect("it has not ended");
        while let Ok((length, _)) = recv(control, &mut packet, RecvFlags::DONTWAIT) {
            packets += std::str::from_utf8(&packet[..length]).expect("JSON");
        }
        packets
    }

    /// How many removed files the process has open, besides the guest's memory.
    pub fn removed_files(&self) -> usize {
        let descriptors = fs::read_dir(format!("/proc/{}/fd", self.pid)).unwrap();
        let names = descriptors.filter_map(|entry| fs::read_link(entry.unwrap().path()).ok());
        let removed = |name: &str| name.ends_with("(deleted)") && !name.starts_with("/memfd:");
        names.filter(|name| removed(&name.to_string_lossy())).count()
    }

    /// A descriptor of the process.
    pub fn pidfd(&self) -> OwnedFd {
        let pid = rustix::process::Pid::from_raw(self.pid.as_raw()).unwrap();
        rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap()
    }

    /// Waits for the process to end, which it does once the guest is gone.
    pub fn wait(mut self) {
        let status = waitpid(self.pid, None).unwrap();
        self.control = None;
        assert_eq!(status, WaitStatus::Exited(self.pid, 0));
    }
}

impl Drop for FsProcess {
    fn drop(&mut self) {
        // The process ends with its control socket; after `wait` there is none.
        if self.control.take().is_some() {
            let _ = waitpid(self.pid, None);
        }
    }
}

fn serve(config: FsConfig, control: OwnedFd, limits: Limits) -> ! {
    drop(control);
    let limit = |resource, value: Option<u64>| {
        if value.is_some() {
            setrlimit(resource, Rlimit { current: value, maximum: value }).unwrap();
        }
    };
    limit(Resource::Nofile, limits.open_files);
    limit(Resource::Fsize, limits.file_size);
    // Else they would be raised again.
    let mut own = capctl::CapState::get_current().unwrap();
    own.permitted.drop(capctl::Cap::SYS_RESOURCE);
    own.effective.drop(capctl::Cap::SYS_RESOURCE);
    own.set_current().unwrap();
    // SAFETY: the descriptors are the parent's, which has a table of its own by now.
    let status = match unsafe { kiln_vmm::virtio::fs::serve(config) } {
        Ok(()) => 0,
        Err(error) => {
            let mut source: Option<&dyn std::error::Error> = Some(&error);
            while let Some(error) = source {
                eprintln!("fs backend: {error}");
                source = error.source();
            }
            1
        }
    };
    // SAFETY: ends the process without the parent's clean-up, which isn't the child's to do.
    unsafe { libc::_exit(status) }
}

/// The guest kernel: `$KILN_LIB_DIR/vmlinux`, or where the build leaves it.
fn kernel() -> PathBuf {
    let directory = match std::env::var_os("KILN_LIB_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/lib/kiln"),
    };
    let kernel = directory.join("vmlinux");
    assert!(
        kernel.is_file(),
        "no guest kernel at {}: build it (make kernel) or set KILN_LIB_DIR",
        kernel.display()
    );
    kernel
}

/// Compiles the guest's program, static, and returns where it is.
pub fn program(directory: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fs_semantics/semantics.c");
    let program = directory.join("semantics");
    let mut compiler = Command::new("gcc");
    compiler.args(["-static", "-O1", "-Wall", "-o"]).arg(&program).arg(source);
    let status = compiler.status().expect("gcc is needed to build the guest's program");
    assert!(status.success(), "gcc failed");
    program
}

fn initramfs(directory: &Path, program: &Path) -> PathBuf {
    let path = directory.join("initramfs");
    let entry = cpio::NewcBuilder::new("init").mode(0o100_755);
    let device = cpio::NewcBuilder::new("dev").mode(0o40_755);
    let console = cpio::NewcBuilder::new("dev/console").mode(0o20_600).rdev_major(5).rdev_minor(1);
    let contents = |bytes: Vec<u8>| std::io::Cursor::new(bytes);
    let inputs = vec![
        (device, contents(Vec::new())),
        (console, contents(Vec::new())),
        (entry, contents(fs::read(program).unwrap())),
    ];
    let archive = cpio::write_cpio(inputs.into_iter(), File::create(&path).unwrap()).unwrap();
    archive.sync_all().unwrap();
    path
}

/// A running guest.
pub struct Guest {
    qemu: Child,
    lines: Receiver<String>,
}

impl Guest {
    /// Boots a guest that does `task` in what is shared on `socket`.
    pub fn boot(directory: &Path, program: &Path, socket: &Path, task: &str) -> Self {
        let queues = if task.ends_with("one-queue") { 1 } else { 2 };
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "512", "-smp", "2"])
            .args(["-M", "microvm,rtc=off,acpi=off,memory-backend=mem"])
            .args(["-object", "memory-backend-memfd,id=mem,size=512M,share=on"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-serial", "stdio", "-kernel"])
            .arg(kernel())
            .arg("-initrd")
            .arg(initramfs(directory, program))
            .arg("-append")
            .arg(format!("console=ttyS0 panic=-1 reboot=t quiet kiln.task={task}"))
            .arg("-chardev")
            .arg(format!("socket,id=fs,path={}", socket.display()))
            .arg("-device")
            .arg(format!("vhost-user-fs-device,chardev=fs,tag=kiln,num-request-queues={queues}"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut qemu = qemu.spawn().expect("qemu-system-x86_64 is needed: install it");
        let output = BufReader::new(qemu.stdout.take().unwrap());
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).trim_end().to_owned();
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        Self { qemu, lines }
    }

    /// What the guest prints, to its end. `on_line` sees each line as it comes.
    pub fn run(mut self, mut on_line: impl FnMut(&str)) -> Vec<String> {
        let mut all = Vec::new();
        while let Ok(line) = self.lines.recv_timeout(PATIENCE) {
            on_line(&line);
            let _ = writeln!(std::io::stderr(), "guest: {line}");
            all.push(line);
        }
        assert!(self.qemu.try_wait().is_ok(), "QEMU can't be waited for");
        let ended = all.iter().any(|line| line == "end");
        assert!(ended, "the guest did not come to its end; its last lines are above");
        self.qemu.wait().unwrap();
        all
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}
