//! The processes that make a sandbox's machine, for either engine.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use kiln_protocol::{CONTROL_PORT, SHARE_TAG};
use kiln_vmm::config::{
    BootConfig, ConsoleConfig, ConsoleKind, DevicesConfig, Entry, FsConfig, JailConfig,
    MachineConfig, NetConfig, RateConfig, ShareConfig, SharedMount, SharedTree, VmmConfig,
    VsockConfig,
};
use kiln_vmm::emulated::clock::Meter;
use kiln_vmm::emulated::qemu;
use kiln_vmm::jail::foreign::Foreign;
use kiln_vmm::jail::{identity, sandbox_limits};
use kiln_vmm::virtio::vsock::broker::Broker;
use serde_json::json;

use super::events::{Sources, second};
use super::trace::{Trace, Track};
use super::{ContainerConfig, Engine, GuestConfig, packet, phases};
use crate::engine::device;
use crate::network::Device;
use crate::place::overlay;
use crate::process::{Launch, Process, memory_file};
use crate::state::StateDir;

/// The guest's context id. Each guest is alone with its device, so all may have the same.
const GUEST_CID: u64 = 3;

/// Which process of a machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// `kiln fs`.
    Fs,
    /// `kiln vmm`.
    Vmm,
    /// `kiln devices`.
    Devices,
    /// QEMU.
    Qemu,
    /// No process: the guest's console.
    Console,
}

impl Role {
    /// As it is named in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fs => "file system process",
            Self::Vmm => "machine process",
            Self::Devices => "device process",
            Self::Qemu => "QEMU",
            Self::Console => "console",
        }
    }

    /// The guest ends when this process does.
    pub fn is_machine(self) -> bool {
        matches!(self, Self::Vmm | Self::Qemu)
    }
}

/// A machine's processes. They are killed when this is dropped, the machine first.
#[derive(Debug, Default)]
pub struct Machine {
    processes: Vec<Member>,
}

/// A process of a machine.
#[derive(Debug)]
struct Member {
    role: Role,
    process: Process,
    /// When it was started, by `CLOCK_MONOTONIC`.
    begun: Duration,
    /// When its end was noticed.
    ended: Option<Duration>,
}

impl Machine {
    /// The process of a role.
    pub fn process(&mut self, role: Role) -> Option<&mut Process> {
        self.processes.iter_mut().find(|member| member.role == role).map(|m| &mut m.process)
    }

    /// Notes that the process of a role has ended.
    pub fn ended(&mut self, role: Role) {
        let member = self.processes.iter_mut().find(|member| member.role == role);
        if let Some(member) = member.filter(|member| member.ended.is_none()) {
            member.ended = Some(phases::now());
        }
    }

    /// The guest ends the moment that this is called, if it hasn't. The lives of the processes are
    /// traced.
    pub fn kill(&mut self, trace: &mut Trace) {
        for member in &mut self.processes {
            member.process.kill();
        }
        for Member { role, mut process, begun, ended } in self.processes.drain(..) {
            // Killed, it ends; and nobody else waits for it.
            let _ = process.wait();
            let track = Track { process: process.id(), row: process.id().into() };
            trace.name_process(process.id(), role.name());
            let ended = ended.unwrap_or_else(phases::now);
            trace.span(track, role.name(), begun, ended, json!({}));
        }
    }

    fn add(&mut self, role: Role, process: Process, sources: &Sources) -> io::Result<()> {
        tracing::debug!(role = role.name(), pid = process.id(), "process started");
        sources.watch_process(role, second(process.pidfd())?)?;
        let member = Member { role, process, begun: phases::now(), ended: None };
        // The machine goes first, so that its backends see it end.
        self.processes.insert(0, member);
        Ok(())
    }
}

/// What starting a machine takes.
pub struct Parts<'a> {
    /// The container.
    pub container: &'a ContainerConfig,
    /// The machine's size and engine.
    pub guest: &'a GuestConfig,
    /// The guest's kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: File,
    /// Where sockets are bound for a moment.
    pub state: &'a StateDir,
    /// Where everything that happens is reported to.
    pub sources: &'a Sources,
    /// How the processes log.
    pub options: &'a [OsString],
    /// Its network devices.
    pub nets: Vec<Device>,
}

/// Starts the machine. Gives the monitor's end of the vsock broker too.
///
/// # Errors
/// What is missing on the host, named, with the mend.
pub fn start(parts: Parts<'_>) -> anyhow::Result<(Machine, Broker)> {
    let mut machine = Machine::default();
    let emulated = parts.guest.engine == Engine::Emulated;
    let clock = emulated.then(Meter::begin).flatten();
    let jail = identity::allocate().context("the machine's user")?;
    let (broker, device_broker) = Broker::pair().context("vsock broker")?;
    let share = start_fs(&parts, &mut machine).context("file system process")?;
    let vsock = Vsock { broker: device_broker, jail };
    match parts.guest.engine {
        Engine::Kvm => start_vmm(parts, share, vsock, &mut machine).context("machine process")?,
        Engine::Emulated => {
            start_qemu(parts, share, vsock, clock, &mut machine).context("emulated engine")?
        }
    }
    Ok((machine, broker))
}

struct Vsock {
    broker: OwnedFd,
    jail: JailConfig,
}

/// Starts the virtio-fs backend; gives the connection for its frontend.
fn start_fs(parts: &Parts<'_>, machine: &mut Machine) -> anyhow::Result<UnixStream> {
    let container = parts.container;
    let (listener, connection) = parts.state.private_socket().context("socket")?;
    let mut launch = Launch::verb("fs", parts.options);
    let control = control_socket(parts.sources, Role::Fs)?;
    let rootfs = SharedTree {
        source: launch.give(open_path(&container.rootfs)?),
        read_only: container.rootfs_read_only,
    };
    let mut mounts = Vec::with_capacity(container.binds.len());
    for bind in &container.binds {
        let source: OwnedFd = match &bind.overlay[..] {
            [] => open_path(&bind.source)?.into(),
            parameters => overlay::mount(parameters)
                .with_context(|| format!("mounts[{}]: overlay", bind.index))?,
        };
        mounts.push(SharedMount {
            index: u32::try_from(bind.index)?,
            source: launch.give(source),
            is_mount: !bind.overlay.is_empty(),
            read_only: bind.read_only,
            is_file: bind.is_file,
            recursive: bind.recursive,
        });
    }
    let config = FsConfig {
        id: container.id.clone(),
        socket: launch.give(listener),
        rootfs,
        mounts,
        limits: parts.guest.files,
        control: launch.give(control),
    };
    spawn(launch, &config, Role::Fs, parts.sources, machine)?;
    Ok(connection)
}

fn open_path(path: &Path) -> anyhow::Result<File> {
    std::fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
        .open(path)
        .with_context(|| path.display().to_string())
}

/// A control socket for a process, whose other end is watched.
fn control_socket(sources: &Sources, role: Role) -> io::Result<OwnedFd> {
    let (own, theirs) = packet::pair()?;
    sources.watch_control(role, own)?;
    Ok(theirs)
}

/// Starts one of kiln's own processes; what it writes to standard error is watched.
fn spawn(
    mut launch: Launch,
    config: &impl serde::Serialize,
    role: Role,
    sources: &Sources,
    machine: &mut Machine,
) -> anyhow::Result<()> {
    launch.configure(config)?.alone();
    let (errors, their_errors) = io::pipe()?;
    sources.watch_output(role, errors.into())?;
    launch.stdio(Stdio::null(), Stdio::null(), their_errors.into());
    machine.add(role, launch.spawn()?, sources)?;
    Ok(())
}

fn vsock_config(launch: &mut Launch, broker: OwnedFd) -> VsockConfig {
    VsockConfig {
        guest_cid: GUEST_CID,
        broker: launch.give(broker),
        host_ports: vec![CONTROL_PORT],
    }
}

/// The kernel's command line: `machine` is what is particular to this one.
fn cmdline(machine: &str, more: &str) -> String {
    format!("console=ttyS0 quiet panic=-1 {machine} {more}").trim_end().to_owned()
}

fn net_config(launch: &mut Launch, device: Device, rate: RateConfig) -> NetConfig {
    NetConfig {
        tap: launch.give(device.tap),
        mac: device.address,
        // The agent sets it, once it is known which interface the device is to be.
        mtu: None,
        receive: rate,
        transmit: rate,
    }
}

fn start_vmm(
    parts: Parts<'_>,
    share: UnixStream,
    vsock: Vsock,
    processes: &mut Machine,
) -> anyhow::Result<()> {
    let mut launch = Launch::verb("vmm", parts.options);
    let control = control_socket(parts.sources, Role::Vmm)?;
    let (console, their_console) = io::pipe()?;
    parts.sources.watch_output(Role::Console, console.into())?;
    let machine = MachineConfig {
        id: parts.container.id.clone(),
        kvm: launch.give(open_kvm()?),
        memory_mib: parts.guest.memory_mib,
        cpus: parts.guest.cpus,
        boot: BootConfig {
            kernel: launch.give(parts.kernel),
            initrd: Some(launch.give(parts.initrd)),
            cmdline: cmdline("reboot=k", &parts.guest.kernel_args),
            entry: Entry::Auto,
        },
        console: ConsoleConfig {
            kind: ConsoleKind::Serial,
            input: None,
            output: Some(launch.give(their_console)),
        },
        disks: Vec::new(),
        nets: parts
            .nets
            .into_iter()
            .map(|device| net_config(&mut launch, device, parts.guest.network))
            .collect(),
        shares: vec![ShareConfig { tag: SHARE_TAG.to_owned(), socket: launch.give(share) }],
        vsock: Some(vsock_config(&mut launch, vsock.broker)),
        jail: vsock.jail,
    };
    let config = VmmConfig { machine, control: launch.give(control) };
    spawn(launch, &config, Role::Vmm, parts.sources, processes)?;
    Ok(())
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// With the mend.
pub fn open_kvm() -> anyhow::Result<File> {
    device::open().context("kvm engine (--engine emulated runs without it, slowly)")
}

fn start_qemu(
    mut parts: Parts<'_>,
    share: UnixStream,
    vsock: Vsock,
    clock: Option<Meter>,
    machine: &mut Machine,
) -> anyhow::Result<()> {
    let jail = vsock.jail;
    let (listener, connection) = parts.state.private_socket().context("socket")?;
    let program = find_program(&parts.guest.qemu)?;
    let mut launch = Launch::program(&program);
    let mut devices = vec![
        qemu::Device::Fs { tag: SHARE_TAG.to_owned(), socket: launch.give(share) },
        qemu::Device::Vsock { socket: launch.give(connection) },
    ];
    let mut nets = Vec::new();
    for device in std::mem::take(&mut parts.nets) {
        let (listener, address) = parts.state.private_listener().context("socket")?;
        let (address, mac) = (launch.give(address), device.address);
        devices.push(qemu::Device::Net { address, mac, mtu: None });
        nets.push((device, listener));
    }
    start_devices(&parts, (listener, vsock), nets, machine).context("device process")?;
    let kernel = readable_by_all(parts.kernel).context("guest kernel")?;
    let clock = clock.map(Meter::kernel_args).unwrap_or_default();
    let qemu = qemu::Machine {
        memory_mib: parts.guest.memory_mib,
        cpus: parts.guest.cpus,
        kernel: launch.give(kernel),
        initrd: Some(launch.give(parts.initrd)),
        cmdline: cmdline(&format!("{} {clock}", qemu::KERNEL_ARGS), &parts.guest.kernel_args),
        devices,
        foreign_kernel: false,
    };
    let (console, their_console) = io::pipe()?;
    parts.sources.watch_output(Role::Console, console.into())?;
    let (errors, their_errors) = io::pipe()?;
    parts.sources.watch_output(Role::Qemu, errors.into())?;
    launch.args(qemu.arguments());
    launch.stdio(Stdio::null(), their_console.into(), their_errors.into());
    machine.add(Role::Qemu, spawn_qemu(launch, &program, jail)?, parts.sources)?;
    Ok(())
}

fn start_devices(
    parts: &Parts<'_>,
    (listener, vsock): (UnixListener, Vsock),
    nets: Vec<(Device, UnixListener)>,
    machine: &mut Machine,
) -> anyhow::Result<()> {
    let mut launch = Launch::verb("devices", parts.options);
    let control = control_socket(parts.sources, Role::Devices)?;
    let config = DevicesConfig {
        id: parts.container.id.clone(),
        vsock: Some((vsock_config(&mut launch, vsock.broker), launch.give(listener))),
        disks: Vec::new(),
        nets: nets
            .into_iter()
            .map(|(device, listener)| {
                let config = net_config(&mut launch, device, parts.guest.network);
                (config, launch.give(listener))
            })
            .collect(),
        jail: vsock.jail,
        control: launch.give(control),
    };
    spawn(launch, &config, Role::Devices, parts.sources, machine)?;
    Ok(())
}

/// Starts QEMU, `program`, in its jail.
///
/// # Errors
/// It can't be jailed, or executed.
pub fn spawn_qemu(mut launch: Launch, program: &Path, jail: JailConfig) -> anyhow::Result<Process> {
    let jail = Foreign::for_program(jail, sandbox_limits(), program).context("jail of QEMU")?;
    launch.alone();
    launch.spawn_with(move || jail.enter()).context("QEMU")
}

/// Finds a program as a shell does.
///
/// # Errors
/// It isn't there, with the mend.
pub fn find_program(named: &Path) -> anyhow::Result<PathBuf> {
    let search = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    let candidates: Vec<PathBuf> = match named.components().count() {
        1 => std::env::split_paths(&search).map(|dir| dir.join(named)).collect(),
        _ => vec![named.to_owned()],
    };
    match candidates.into_iter().find(|path| path.is_file()) {
        Some(path) => path.canonicalize().with_context(|| path.display().to_string()),
        None => bail!(
            "there is no QEMU at {}: install qemu-system-x86, or name it with `qemu` in the \
             configuration file",
            named.display()
        ),
    }
}

/// A file that any user may open by the descriptor's name in /proc: itself, or a copy in memory.
///
/// # Errors
/// It can't be read, or there is no memory.
pub fn readable_by_all(mut file: File) -> io::Result<File> {
    if file.metadata()?.mode() & 0o004 != 0 {
        return Ok(file);
    }
    let mut copy = memory_file("kiln-kernel")?;
    io::copy(&mut file, &mut copy)?;
    Ok(copy)
}
