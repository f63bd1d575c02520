//! A guest in QEMU whose vsock, disks and network are served by kiln over vhost-user.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kiln_vmm::config::InheritedFd;
use kiln_vmm::emulated::qemu::Device;
use kiln_vmm::transport::vhost_user::{self, ServeError};
use kiln_vmm::virtio::VirtioDevice;
use kiln_vmm::virtio::block::Block;
use kiln_vmm::virtio::net::{Net, Settings};
use kiln_vmm::virtio::vsock::Vsock;
use kiln_vmm::virtio::vsock::broker::Broker;

/// The guest's network card, and who serves it.
enum Card {
    None,
    Kiln(OwnedFd, Settings),
    Qemu(OwnedFd),
}

/// The port of the guest's server.
pub const SERVER: u32 = 1025;

/// A running guest. Dropping it ends QEMU and the devices.
pub struct Guest {
    pub broker: Broker,
    qemu: Child,
    until: Option<UnixStream>,
    devices: Vec<JoinHandle<Result<(), ServeError>>>,
    _directory: tempfile::TempDir,
    console: PathBuf,
}

impl Guest {
    /// Boots a guest with these disks, `(image, read-only)`, and waits until its server listens.
    pub fn boot(disks: &[(&Path, bool)], host_ports: &[u32]) -> Self {
        Self::start(disks, host_ports, Card::None)
    }

    /// Boots a guest on a network and waits until its server listens.
    pub fn boot_on(tap: OwnedFd, settings: Settings) -> Self {
        Self::start(&[], &[], Card::Kiln(tap, settings))
    }

    /// Boots a guest on a network that QEMU itself serves, and waits until its server listens.
    #[allow(dead_code, reason = "for comparison")]
    pub fn boot_on_qemus(tap: OwnedFd) -> Self {
        Self::start(&[], &[], Card::Qemu(tap))
    }

    fn start(disks: &[(&Path, bool)], host_ports: &[u32], card: Card) -> Self {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = |name: &str| directory.path().join(name);
        let (until, devices_until) = UnixStream::pair().expect("socket pair");
        let devices_until = std::sync::Arc::new(devices_until);
        let mut devices = Vec::new();
        let mut serve = |device: Box<dyn VirtioDevice>, name: &str| {
            let listener = UnixListener::bind(path(name)).expect("listening socket");
            let until = devices_until.clone();
            devices
                .push(thread::spawn(move || vhost_user::serve(device, &listener, until.as_fd())));
        };

        let (broker, device_end) = Broker::pair().expect("broker");
        let ports: Vec<u32> = [1024].iter().chain(host_ports).copied().collect();
        serve(Box::new(Vsock::new(3, &ports, device_end).expect("vsock")), "vsock");
        for (index, (image, read_only)) in disks.iter().enumerate() {
            let file = File::options().read(true).write(!read_only).open(image).expect("image");
            let disk = Block::new(file, *read_only, "test").expect("disk");
            serve(Box::new(disk), &format!("disk{index}"));
        }
        // The descriptor that QEMU inherits, and its arguments.
        let (_inherited, card) = match card {
            Card::None => (None, Vec::new()),
            Card::Kiln(tap, settings) => {
                serve(Box::new(Net::new(tap, settings).expect("network device")), "net");
                let Settings { mac, mtu, .. } = settings;
                let mut options = File::options();
                let address = options.read(true).custom_flags(libc::O_PATH).open(path("net"));
                let address = OwnedFd::from(address.expect("address"));
                let device = Device::Net { address: inherited(&address), mac, mtu };
                (Some(address), device.arguments("net"))
            }
            Card::Qemu(tap) => {
                let back_end = format!("tap,id=net,fd={}", inherited(&tap).0);
                let arguments = ["-netdev", &back_end, "-device", "virtio-net-device,netdev=net"];
                (Some(tap), arguments.map(str::to_owned).into())
            }
        };

        let initrd = path("initrd");
        fs::write(&initrd, initramfs()).expect("initrd");
        let console = path("console");
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-m", "256", "-smp", "2"])
            .args(["-M", "microvm,rtc=off,acpi=off,memory-backend=mem"])
            .args(["-object", "memory-backend-memfd,id=mem,size=256M,share=on"])
            .args(["-global", "virtio-mmio.force-legacy=false"])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .args(["-serial", "stdio", "-append", "console=ttyS0 panic=-1 reboot=t quiet"])
            .arg("-kernel")
            .arg(kernel())
            .arg("-initrd")
            .arg(initrd);
        let mut device = |name: &str, kind: &str| {
            let socket = path(name);
            qemu.arg("-chardev").arg(format!("socket,id={name},path={}", socket.display()));
            qemu.arg("-device").arg(format!("{kind},chardev={name}"));
        };
        device("vsock", "vhost-user-vsock-device");
        for index in 0..disks.len() {
            device(&format!("disk{index}"), "vhost-user-blk");
        }
        qemu.args(card);
        let output = File::create(&console).expect("console");
        let errors = output.try_clone().expect("console");
        let qemu = qemu
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .expect("qemu-system-x86_64 must be installed");

        let mut guest =
            Self { broker, qemu, until: Some(until), devices, _directory: directory, console };
        guest.wait_until_ready();
        guest
    }

    fn wait_until_ready(&mut self) {
        let mut ready = loop {
            match self.broker.try_accept() {
                Ok(Some((1024, stream))) => break stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                other => panic!("not the guest's greeting: {other:?}"),
            }
            if let Some(status) = self.qemu.try_wait().expect("waits") {
                panic!("the guest did not start: {status}");
            }
            thread::sleep(Duration::from_millis(10));
        };
        ready.set_nonblocking(false).expect("blocking");
        let mut greeting = [0; 5];
        ready.read_exact(&mut greeting).expect("greeting");
        assert_eq!(&greeting, b"ready");
    }

    /// What the guest has printed.
    pub fn console(&self) -> String {
        fs::read_to_string(&self.console).unwrap_or_default()
    }

    /// Connects to the guest's server and gives it a command with its arguments.
    pub fn call(&self, command: u8, arguments: &[u8]) -> UnixStream {
        let mut stream = self.broker.connect(SERVER).expect("connects");
        stream.write_all(&[command]).expect("command");
        stream.write_all(arguments).expect("arguments");
        stream
    }

    /// Gives a command and returns everything that the server answers.
    pub fn ask(&self, command: u8, arguments: &[u8]) -> Vec<u8> {
        let mut stream = self.call(command, arguments);
        stream.shutdown(Shutdown::Write).expect("half-closes");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("answer");
        answer
    }

    /// Has the guest reset its machine, and waits for QEMU and then the devices to end.
    pub fn power_off(mut self) {
        self.call(b'p', &[]);
        assert!(self.qemu.wait().expect("waits").success(), "{}", self.console());
        drop(self.until.take());
        for device in self.devices.drain(..) {
            device.join().expect("no panic").expect("served to the end");
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
        drop(self.until.take());
        for device in self.devices.drain(..) {
            let _ = device.join();
        }
        if thread::panicking() {
            eprintln!("--- console\n{}", self.console());
        }
    }
}

/// Lets QEMU inherit a descriptor.
fn inherited(fd: &OwnedFd) -> InheritedFd {
    // SAFETY: the descriptor is open.
    let kept = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, 0) };
    assert_eq!(kept, 0);
    InheritedFd(fd.as_raw_fd())
}

/// The byte at each place of the pattern that is sent and checked.
pub fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|at| (at.wrapping_mul(131) ^ (at >> 9)) as u8).collect()
}

fn kernel() -> PathBuf {
    let directory = std::env::var_os("KILN_LIB_DIR").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/lib/kiln"),
        PathBuf::from,
    );
    let kernel = directory.join("vmlinux");
    assert!(
        kernel.exists(),
        "{} is missing: build the guest kernel (make kernel), or name its folder in KILN_LIB_DIR",
        kernel.display()
    );
    kernel
}

/// An initial RAM disk whose init is `init.c`.
fn initramfs() -> &'static [u8] {
    static INITRAMFS: OnceLock<Vec<u8>> = OnceLock::new();
    INITRAMFS.get_or_init(|| {
        let directory = tempfile::tempdir().expect("temporary directory");
        let program = directory.path().join("init");
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulated/init.c");
        let compiled = Command::new("gcc")
            .args(["-static", "-O2", "-Wall", "-Werror", "-s", "-o"])
            .arg(&program)
            .arg(source)
            .status()
            .expect("gcc must be installed");
        assert!(compiled.success(), "init.c does not compile");
        archive(&fs::read(program).expect("init"))
    })
}

/// A cpio archive (`newc`) with `/init` and the console's device node.
fn archive(init: &[u8]) -> Vec<u8> {
    let mut archive = Vec::new();
    entry(&mut archive, "dev", 0o040_755, (0, 0), &[]);
    entry(&mut archive, "dev/console", 0o020_600, (5, 1), &[]);
    entry(&mut archive, "init", 0o100_755, (0, 0), init);
    entry(&mut archive, "TRAILER!!!", 0, (0, 0), &[]);
    archive
}

fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, device: (u32, u32), data: &[u8]) {
    let fields = [
        archive.len() as u32,
        mode,
        0,
        0,
        1,
        0,
        data.len() as u32,
        0,
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").as_bytes());
    }
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
