//! What a vmm process is told when it starts.
//!
//! The monitor opens every resource, starts the process with them as inherited file descriptors,
//! and passes one of these as JSON (the fd number is on the command line). A vmm opens nothing by
//! path. Memory sizes are MiB.

use std::num::NonZeroU64;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use serde::{Deserialize, Serialize};

/// Number of an inherited file descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct InheritedFd(pub RawFd);

impl InheritedFd {
    /// Takes the descriptor over.
    ///
    /// # Safety
    /// The number is an open descriptor that nothing else in this process owns. A process's
    /// configuration names each descriptor once and each is taken once.
    pub unsafe fn take(self) -> OwnedFd {
        // SAFETY: the caller's promise.
        unsafe { OwnedFd::from_raw_fd(self.0) }
    }
}

/// What `kiln vmm` is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmmConfig {
    /// What it runs.
    pub machine: MachineConfig,
    /// A connected `SOCK_SEQPACKET` Unix socket on which the process sends [`VmmEvent`]s, one JSON
    /// object a packet. When the other end closes, the process ends.
    pub control: InheritedFd,
}

/// A machine of the kvm engine.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The sandbox's id, for log lines.
    pub id: String,
    /// `/dev/kvm`, opened.
    pub kvm: InheritedFd,
    /// Guest memory in MiB, at least 1.
    pub memory_mib: u64,
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// What is booted.
    pub boot: BootConfig,
    /// The serial console, and whether a virtio console takes its place on the fds.
    pub console: ConsoleConfig,
    /// Block devices, in the order the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// Shared file trees.
    pub shares: Vec<ShareConfig>,
    /// Network devices, in the order the guest finds them.
    pub nets: Vec<NetConfig>,
    /// The vsock device.
    pub vsock: Option<VsockConfig>,
    /// Who the process becomes.
    pub jail: JailConfig,
}

impl MachineConfig {
    /// Every descriptor that it names: what the process keeps when it is jailed.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let one = [self.kvm, self.boot.kernel];
        let optional = [self.boot.initrd, self.console.input, self.console.output];
        let disks = self.disks.iter().map(|disk| disk.file);
        let shares = self.shares.iter().map(|share| share.socket);
        let nets = self.nets.iter().map(|net| net.tap);
        let vsock = self.vsock.iter().map(|vsock| vsock.broker);
        let all = one.into_iter().chain(optional.into_iter().flatten());
        all.chain(disks).chain(shares).chain(nets).chain(vsock).map(|fd| fd.0).collect()
    }
}

/// What a machine boots.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootConfig {
    /// The kernel: an uncompressed x86-64 ELF.
    pub kernel: InheritedFd,
    /// The initial RAM disk.
    pub initrd: Option<InheritedFd>,
    /// The kernel command line; the machine appends its virtio-mmio devices.
    pub cmdline: String,
    /// How the kernel is entered.
    pub entry: Entry,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Entry {
    /// PVH where the ELF has the note, else the 64-bit entry.
    Auto,
    /// The 64-bit Linux boot protocol at the ELF's entry point.
    Linux64,
    /// PVH (`XEN_ELFNOTE_PHYS32_ENTRY`).
    Pvh,
}

/// Where the guest's console goes.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ConsoleConfig {
    /// Which device the fds belong to.
    pub kind: ConsoleKind,
    /// What the guest reads, if anything.
    pub input: Option<InheritedFd>,
    /// Where its output goes, if anywhere. A writer that blocks blocks the guest's console only.
    pub output: Option<InheritedFd>,
}

/// The device that a console is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConsoleKind {
    /// A 16550A at port 0x3f8, irq 4 (`ttyS0`).
    Serial,
    /// virtio-console (`hvc0`).
    Virtio,
}

/// A block device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// A raw image file or a block device, opened as `read_only` says.
    pub file: InheritedFd,
    /// The guest may not write.
    pub read_only: bool,
    /// How fast it is at most.
    #[serde(default)]
    pub limits: DiskLimits,
}

/// Limits of what a guest does with a disk. The default is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Bytes of requests a second, their headers and what they clear included.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests a second.
    pub requests_per_second: Option<NonZeroU64>,
}

/// A shared file tree, served by an fs backend process.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ShareConfig {
    /// The mount tag, at most 36 bytes.
    pub tag: String,
    /// A connected Unix stream socket to the backend, which speaks vhost-user.
    pub socket: InheritedFd,
}

/// A network device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// `/dev/net/tun`, attached to a tap interface of one queue (`IFF_TAP`, `IFF_NO_PI` and
    /// `IFF_VNET_HDR`). The device makes it non-blocking, and sets its header's size and which
    /// offloads it uses.
    pub tap: InheritedFd,
    /// The guest interface's address: unicast.
    pub mac: [u8; 6],
    /// The MTU that the guest's interface gets, 68 to 65535; without one it takes 1500.
    pub mtu: Option<u16>,
    /// What the guest may receive.
    pub receive: RateConfig,
    /// What the guest may send.
    pub transmit: RateConfig,
}

/// Limits of one direction of a network device. The default is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RateConfig {
    /// Bytes of frames a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Packets a second. A frame that is to be cut into segments counts as that many.
    pub packets_per_second: Option<NonZeroU64>,
    /// How many bytes of what was not used can be caught up on at once; without it a twentieth of a
    /// second's.
    pub burst_bytes: Option<NonZeroU64>,
}

/// The vsock device.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, at least 3.
    pub guest_cid: u64,
    /// The device's end of the broker socket (`virtio::vsock`): a `SOCK_SEQPACKET` Unix socket over
    /// which connections are passed as file descriptors, both ways.
    pub broker: InheritedFd,
    /// The host ports that the guest may connect to, each once in the device's life. Any other
    /// connection is refused.
    pub host_ports: Vec<u32>,
}

/// The identity a jailed process takes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    /// User id, not 0.
    pub uid: u32,
    /// Group id, not 0.
    pub gid: u32,
}

/// The devices that QEMU's guest gets from kiln: what `kiln devices` serves over vhost-user.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DevicesConfig {
    /// The sandbox's id, for log lines.
    pub id: String,
    /// The vsock device and the Unix stream socket, listening, on which QEMU's end connects.
    pub vsock: Option<(VsockConfig, InheritedFd)>,
    /// Block devices, likewise.
    pub disks: Vec<(DiskConfig, InheritedFd)>,
    /// Network devices, likewise.
    pub nets: Vec<(NetConfig, InheritedFd)>,
    /// Who the process becomes.
    pub jail: JailConfig,
    /// As in [`VmmConfig::control`].
    pub control: InheritedFd,
}

/// The file trees that a guest shares with the host: what `kiln fs` serves over vhost-user.
///
/// The process runs with the uid it is started with, which owns what the guest's root creates.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FsConfig {
    /// The sandbox's id, for log lines.
    pub id: String,
    /// A Unix stream socket, listening, on which one vhost-user frontend connects.
    pub socket: InheritedFd,
    /// What the guest sees as `rootfs/`.
    pub rootfs: SharedTree,
    /// What the guest sees as `mounts/<index>`, one for each bind mount of the bundle.
    pub mounts: Vec<SharedMount>,
    /// What the guest may do there.
    pub limits: FileLimits,
    /// As in [`VmmConfig::control`].
    pub control: InheritedFd,
}

/// Limits of what a guest does with the files that it shares. The default is none.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct FileLimits {
    /// Bytes of the host's file systems that it may take beside what is there.
    pub space: Option<NonZeroU64>,
    /// Bytes of requests and replies a second.
    pub bytes_per_second: Option<NonZeroU64>,
    /// Requests a second.
    pub requests_per_second: Option<NonZeroU64>,
}

/// A directory of the host, with what is mounted below it, that a guest shares.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedTree {
    /// The directory, opened with `O_PATH` in the mount namespace that the process starts in.
    pub source: InheritedFd,
    /// The guest may not write, whatever is mounted below included.
    pub read_only: bool,
}

/// A file or a directory of the host that a guest shares in a place of its own.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SharedMount {
    /// Its place among the bundle's mounts; no two are the same.
    pub index: u32,
    /// The file or directory, opened as [`SharedTree::source`] is.
    pub source: InheritedFd,
    /// The source is a mount that is nowhere yet, for this place.
    pub is_mount: bool,
    /// The guest may not write, whatever is mounted below included.
    pub read_only: bool,
    /// It is not a directory.
    pub is_file: bool,
    /// With whatever is mounted below it (`rbind`), or without (`bind`).
    pub recursive: bool,
}

impl DevicesConfig {
    /// Every descriptor that it names: what the process keeps when it is jailed.
    #[must_use]
    pub fn descriptors(&self) -> Vec<RawFd> {
        let disks = self.disks.iter().flat_map(|(disk, socket)| [disk.file, *socket]);
        let vsock = self.vsock.iter().flat_map(|(vsock, socket)| [vsock.broker, *socket]);
        let nets = self.nets.iter().flat_map(|(net, socket)| [net.tap, *socket]);
        disks.chain(nets).chain(vsock).chain([self.control]).map(|fd| fd.0).collect()
    }
}

/// What a vmm process tells the monitor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum VmmEvent {
    /// Jailed and about to run the guest (or to serve devices).
    Running,
    /// The guest has ended; the process exits after this.
    Ended {
        /// How.
        how: GuestEnd,
    },
    /// The guest has been refused something because of [`FileLimits::space`]; said once.
    SpaceUsedUp,
    /// The process can't go on and exits after this.
    Failed {
        /// What failed and why: a whole sentence's worth, sources included.
        message: String,
    },
}

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GuestEnd {
    /// It switched the machine off.
    Shutdown,
    /// It asked for a reset.
    Reset,
    /// A fault while delivering a double fault.
    TripleFault,
    /// KVM could not run it any further.
    Broken {
        /// The exit's name and data.
        reason: String,
        /// The vCPU's registers as text, one line each.
        registers: Vec<String>,
    },
}

/// The port a guest writes to in order to switch the machine off: its value is ignored. QEMU's
/// `isa-debug-exit` stands at the same port in the emulated engine.
pub const POWER_OFF_PORT: u16 = 0x501;
