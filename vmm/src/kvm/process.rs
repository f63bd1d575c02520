//! Runs the machine that a configuration describes in the calling process, which jails itself first:
//! [`run`] is what `kiln vmm` does, [`run_alone`] what a command does that needs no monitor.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use rustix::net::SendFlags;

use super::{DeviceGroup, Kernel, KvmError, Machine, Until, Vm};
use crate::config::{
    BootConfig, ConsoleConfig, ConsoleKind, DiskConfig, GuestEnd, InheritedFd, MachineConfig,
    NetConfig, ShareConfig, VmmConfig, VmmEvent, VsockConfig,
};
use crate::jail::Jail;
use crate::sync::lock;
use crate::transport::vhost_user_frontend::{Description, VhostUserBackend};
use crate::virtio::balloon::Balloon;
use crate::virtio::block::Block;
use crate::virtio::console::Console;
use crate::virtio::net::{Net, Settings};
use crate::virtio::rng::Rng;
use crate::virtio::vsock::Vsock;

/// Jails the process, makes the machine, and runs it to its guest's end. What happens is told on
/// the control socket as it happens; when the monitor closes that, the machine stops.
///
/// # Errors
/// A configuration that can't be, or a host that fails. The monitor has been told.
pub fn run(config: VmmConfig) -> Result<GuestEnd, KvmError> {
    let VmmConfig { machine, control } = config;
    let control = take_control(control)?;
    let result = check_descriptors(&machine, control.as_fd()).and_then(|()| {
        let running = || tell(&control, &VmmEvent::Running);
        enter_and_run(machine, Supervision::Monitor(control.as_fd()), running)
    });
    match &result {
        Ok(how) => tell(&control, &VmmEvent::Ended { how: how.clone() }),
        // The monitor has gone, or asked for it.
        Err(KvmError::Stopped) => {}
        Err(error) => tell(&control, &VmmEvent::Failed { message: with_sources(error) }),
    }
    result
}

/// The same in a command that has no monitor: what happens is returned, and nothing ends the process
/// with the one that started it. The machine stops when `stop` becomes readable, and the process is
/// in its jail for good.
///
/// # Safety
/// The descriptors that the configuration names belong to nothing else in this process, and nor does
/// any other that is open but `stop` and standard error: they are closed.
///
/// # Errors
/// A configuration that can't be, or a host that fails; [`KvmError::Stopped`] if it was stopped.
pub unsafe fn run_alone(
    machine: MachineConfig,
    stop: BorrowedFd<'_>,
) -> Result<GuestEnd, KvmError> {
    check_descriptors(&machine, stop)?;
    enter_and_run(machine, Supervision::None { stop }, || ())
}

/// Creates the VM, jails the process, makes the machine and runs it.
fn enter_and_run(
    config: MachineConfig,
    supervision: Supervision<'_>,
    running: impl FnOnce(),
) -> Result<GuestEnd, KvmError> {
    let mut descriptors = config.descriptors();
    let vm = Vm::create(take(config.kvm))?;
    descriptors.extend(vm.descriptors());
    descriptors.push(libc::STDERR_FILENO);
    let (control, until) = match supervision {
        Supervision::Monitor(control) => (Some(control), Until::HangUp(control)),
        Supervision::None { stop } => {
            descriptors.push(stop.as_raw_fd());
            (None, Until::Readable(stop))
        }
    };
    Jail::vmm(config.jail, control, &descriptors)
        .enter()
        .map_err(|error| KvmError::Jail(with_sources(&error)))?;
    let lost = Lost::default();
    let machine = make(vm, config, &lost)?;
    running();
    let ended = machine.run_until(until);
    match (ended, lost.take()) {
        (Err(KvmError::Stopped), Some(tag)) => Err(KvmError::ShareLost(tag)),
        (ended, _) => ended,
    }
}

/// Who is told of a machine, and can stop it.
#[derive(Clone, Copy)]
enum Supervision<'a> {
    /// A monitor, on this control socket.
    Monitor(BorrowedFd<'a>),
    /// Nobody: the process stops it when this is readable.
    None { stop: BorrowedFd<'a> },
}

/// The tag of the first share whose backend process went away.
#[derive(Clone, Default)]
struct Lost(Arc<Mutex<Option<String>>>);

impl Lost {
    fn take(&self) -> Option<String> {
        lock(&self.0).take()
    }
}

fn make(vm: Vm, config: MachineConfig, lost: &Lost) -> Result<Machine, KvmError> {
    let mut machine = Machine::new(vm, config.memory_mib, config.cpus)?;
    for (index, disk) in config.disks.into_iter().enumerate() {
        add_disk(&mut machine, index, disk)?;
    }
    for share in config.shares {
        add_share(&mut machine, share, lost)?;
    }
    for (index, net) in config.nets.into_iter().enumerate() {
        add_net(&mut machine, index, net)?;
    }
    if let Some(vsock) = config.vsock {
        add_vsock(&mut machine, vsock)?;
    }
    machine.add_device(Box::new(Rng::new()), DeviceGroup::Streams)?;
    add_console(&mut machine, config.console)?;
    machine.add_device(Box::new(Balloon::new()), DeviceGroup::Storage)?;
    machine.boot(kernel(config.boot))?;
    Ok(machine)
}

fn kernel(boot: BootConfig) -> Kernel {
    Kernel {
        image: take(boot.kernel).into(),
        initrd: boot.initrd.map(|initrd| take(initrd).into()),
        cmdline: boot.cmdline,
        entry: boot.entry,
    }
}

fn add_disk(machine: &mut Machine, index: usize, disk: DiskConfig) -> Result<(), KvmError> {
    let serial = format!("disk{index}");
    let device = Block::new(take(disk.file).into(), disk.read_only, &serial)
        .and_then(|device| device.limited(disk.limits))
        .map_err(|error| KvmError::Device {
            name: format!("disk {index}"),
            reason: with_sources(&error),
        })?;
    machine.add_device(Box::new(device), DeviceGroup::Storage)
}

fn add_share(machine: &mut Machine, share: ShareConfig, lost: &Lost) -> Result<(), KvmError> {
    let ShareConfig { tag, socket } = share;
    let failed =
        |error| KvmError::Device { name: format!("share {tag:?}"), reason: with_sources(&error) };
    let description = Description::file_system(&tag).map_err(failed)?;
    let (lost, lost_tag, stopper) = (lost.clone(), tag.clone(), machine.stopper());
    let on_lost = move || {
        lock(&lost.0).get_or_insert(lost_tag);
        stopper.stop();
    };
    let backend = VhostUserBackend::new(UnixStream::from(take(socket)), description, on_lost)
        .map_err(failed)?;
    machine.add_backend(Box::new(backend))
}

fn add_net(machine: &mut Machine, index: usize, net: NetConfig) -> Result<(), KvmError> {
    let NetConfig { tap, mac, mtu, receive, transmit } = net;
    let device =
        Net::new(take(tap), Settings { mac, mtu, receive, transmit }).map_err(|error| {
            KvmError::Device {
                name: format!("network device {index}"),
                reason: with_sources(&error),
            }
        })?;
    machine.add_device(Box::new(device), DeviceGroup::Network)
}

fn add_vsock(machine: &mut Machine, vsock: VsockConfig) -> Result<(), KvmError> {
    let device = Vsock::new(vsock.guest_cid, &vsock.host_ports, take(vsock.broker))
        .map_err(|e| KvmError::Device { name: "vsock".into(), reason: with_sources(&e) })?;
    machine.add_device(Box::new(device), DeviceGroup::Streams)
}

fn add_console(machine: &mut Machine, console: ConsoleConfig) -> Result<(), KvmError> {
    let (input, output) = (console.input.map(take), console.output.map(take));
    match console.kind {
        ConsoleKind::Serial if input.is_none() && output.is_none() => Ok(()),
        ConsoleKind::Serial => machine.add_serial(input, output),
        ConsoleKind::Virtio => {
            let device = Console::new(input, output, None)
                .map_err(KvmError::host("make the virtio console"))?;
            machine.add_device(Box::new(device), DeviceGroup::Streams)
        }
    }
}

/// The control socket, on which all else can be told.
fn take_control(control: InheritedFd) -> Result<OwnedFd, KvmError> {
    match control.0 {
        number if is_open(number) => Ok(take(control)),
        number => Err(KvmError::Descriptor { number, problem: "is not open" }),
    }
}

/// Checks that each descriptor is open, named once, and another than `own`, which [`take`] relies on.
fn check_descriptors(config: &MachineConfig, own: BorrowedFd<'_>) -> Result<(), KvmError> {
    let mut numbers = config.descriptors();
    numbers.push(own.as_raw_fd());
    numbers.sort_unstable();
    if let Some(pair) = numbers.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(KvmError::Descriptor { number: pair[0], problem: "is named twice" });
    }
    match numbers.into_iter().find(|number| !is_open(*number)) {
        Some(number) => Err(KvmError::Descriptor { number, problem: "is not open" }),
        None => Ok(()),
    }
}

fn is_open(number: i32) -> bool {
    // SAFETY: asks for a number's flags; one that isn't open is an error and nothing else.
    number >= 0 && unsafe { libc::fcntl(number, libc::F_GETFD) } >= 0
}

fn take(fd: InheritedFd) -> OwnedFd {
    // SAFETY: it was found open, `check_descriptors` found it named once before any but the
    // control socket was taken, and this process takes nothing over but what is named.
    unsafe { fd.take() }
}

fn tell(control: &OwnedFd, event: &VmmEvent) {
    let sent = serde_json::to_vec(event)
        .map_err(std::io::Error::from)
        .and_then(|packet| Ok(rustix::net::send(control, &packet, SendFlags::NOSIGNAL)?));
    if let Err(error) = sent {
        tracing::warn!("the monitor could not be told {event:?}: {error}");
    }
}

/// An error's message with those of its sources.
fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(&error.to_string());
        source = error.source();
    }
    text
}
