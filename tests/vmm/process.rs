//! `kiln vmm`, started as the monitor does it.

#![allow(dead_code, reason = "no test needs all of this")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus, Stdio};

use kiln_vmm::config::{
    BootConfig, ConsoleConfig, ConsoleKind, DiskConfig, DiskLimits, Entry, InheritedFd, JailConfig,
    MachineConfig, VmmConfig, VmmEvent,
};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, socketpair};

/// A vmm process and the monitor's end of its control socket.
pub struct Vmm {
    process: Child,
    /// The monitor's end.
    pub control: OwnedFd,
    /// The guest's console.
    output: BufReader<std::io::PipeReader>,
    errors: File,
}

/// Lets a child process have a descriptor.
pub fn inherited(fd: &impl AsFd) -> InheritedFd {
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    InheritedFd(fd.as_fd().as_raw_fd())
}

/// A file that holds these bytes.
pub fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file.rewind().unwrap();
    file
}

/// A disk that may be written, without limits.
pub fn disk_of(file: &File) -> DiskConfig {
    DiskConfig { file: inherited(file), read_only: false, limits: DiskLimits::default() }
}

impl Vmm {
    /// Runs a kernel on a machine of 64 MiB.
    pub fn start(kernel: &[u8], cpus: u8) -> Self {
        Self::start_with(kernel, cpus, |_| ())
    }

    /// The same; `change` has the configuration before it is used.
    pub fn start_with(kernel: &[u8], cpus: u8, change: impl FnOnce(&mut MachineConfig)) -> Self {
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        let kvm = kvm.expect("these tests need /dev/kvm");
        let kernel = file_of(kernel);
        let (output, guest_end) = std::io::pipe().unwrap();
        let (control, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let mut machine = MachineConfig {
            id: "test".into(),
            kvm: inherited(&kvm),
            memory_mib: 64,
            cpus,
            boot: BootConfig {
                kernel: inherited(&kernel),
                initrd: None,
                cmdline: String::new(),
                entry: Entry::Auto,
            },
            console: ConsoleConfig {
                kind: ConsoleKind::Serial,
                input: None,
                output: Some(inherited(&guest_end)),
            },
            disks: Vec::new(),
            nets: Vec::new(),
            shares: Vec::new(),
            vsock: None,
            jail: JailConfig { uid: 65_000, gid: 65_000 },
        };
        change(&mut machine);
        let config = VmmConfig { machine, control: inherited(&theirs) };
        let config = file_of(&serde_json::to_vec(&config).unwrap());
        let errors = tempfile::tempfile().unwrap();
        let process = Command::new(env!("CARGO_BIN_EXE_kiln"))
            .args(["vmm", "--config-fd", &inherited(&config).0.to_string()])
            .stdin(Stdio::null())
            .stderr(errors.try_clone().unwrap())
            .spawn()
            .unwrap();
        Self { process, control, output: BufReader::new(output), errors }
    }

    /// What it tells the monitor next; nothing when it has ended.
    pub fn event(&self) -> Option<VmmEvent> {
        let mut packet = vec![0; 1 << 16];
        let length = recv(self.control.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
        (length > 0).then(|| serde_json::from_slice(&packet[..length]).unwrap())
    }

    /// Waits until the guest has written a line to its console.
    pub fn wait_for_line(&mut self) -> String {
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        line
    }

    /// The guest's console, as far as no line of it was waited for.
    pub fn output(&mut self) -> &mut impl Read {
        &mut self.output
    }

    /// What it has logged.
    pub fn errors(&self) -> String {
        let mut text = Vec::new();
        let mut errors = self.errors.try_clone().unwrap();
        errors.rewind().unwrap();
        errors.read_to_end(&mut text).unwrap();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        self.process.wait().unwrap()
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// A line of its `/proc/PID/status`.
    pub fn status_line(&self, name: &str) -> String {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
    }

    /// The names of its threads, in order.
    pub fn thread_names(&self) -> Vec<String> {
        let threads = fs::read_dir(format!("/proc/{}/task", self.process.id())).unwrap();
        let mut names: Vec<_> = threads
            .map(|thread| fs::read_to_string(thread.unwrap().path().join("comm")).unwrap())
            .map(|name| name.trim().to_owned())
            // Threads of the kernel's own, for machines.
            .filter(|name| !name.starts_with("kvm-"))
            .collect();
        names.sort();
        names
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if std::thread::panicking() {
            eprintln!("{}", self.errors());
        }
    }
}
