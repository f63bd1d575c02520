//! QEMU as the emulated engine's machine: its command line, and what its end means.
//!
//! QEMU gives the guest a software CPU, memory, an interrupt controller, a serial port and virtio
//! transports. Every device behind those transports is kiln's own, served over vhost-user by
//! processes of their own, but for the one by which free memory goes back to the host; QEMU is handed connected sockets. It has no monitor, no network, no
//! disk of its own, and forbids itself to start programs or change identity (`-sandbox`).
//!
//! # What keeps it fast
//! The software CPU translates code page by page and keeps a list of translations for each page. It
//! goes through the whole list at every write to that page, as long as there is something in it. Two
//! things make that take minutes, and are left out:
//! * A process whose libraries lie at addresses of its own has translations of its own. After some
//!   hundred processes the lists have thousands of entries, and a page of program text that the
//!   guest's kernel takes back and gives to somebody else, as it does at a memory limit, is written
//!   byte by byte through all of that. With [`KERNEL_ARGS`] all processes share their translations,
//!   which also saves half the time of starting a program.
//! * `rep stosb` and `rep movsb` are one write a byte here, so the guest is not told that they are fast
//!   (`erms`, `fsrm`).
//!
//! # What keeps it right
//! QEMU before 8.0 leaves the flags in disorder after `cmpxchg16b`, until the next instruction that sets
//! them: it computes them from what an earlier one has left. An interrupt in between saves and restores
//! them as they are, single-step mode among them, of which the kernel dies; it does where there is little
//! else than interrupts, in a machine within a machine. So the kernel is told not to use the instruction
//! for its own memory, as it would all the time (`clearcpuid=cx16`). Programs find it all the same, as
//! they must (x86-64-v2).
//!
//! # How a guest ends
//! A write to [`POWER_OFF_PORT`] ends QEMU with an odd status, which nothing else does but a failure
//! of its own (status 1), so the value 0 isn't told from one: what was written is
//! irrelevant, and a failure comes with a message instead of a reset log. A reset ends QEMU with
//! status 0 because of `-no-reboot`; with [`Machine::foreign_kernel`] its log on standard error tells a
//! triple fault from a reset that was asked for.

use crate::config::{GuestEnd, InheritedFd, POWER_OFF_PORT};

/// The line that QEMU's software CPU logs (`-d cpu_reset`) when a guest triple-faults.
const TRIPLE_FAULT: &str = "Triple fault";

/// QEMU's network device has a control queue of its own making unless it is told not to, and then
/// must not offer what is asked for over it. kiln's has none.
const NO_CONTROL_QUEUE: &str = "ctrl_vq=off,ctrl_rx=off,ctrl_rx_extra=off,ctrl_vlan=off,\
                                ctrl_mac_addr=off,ctrl_guest_offloads=off,guest_announce=off";

/// QEMU's own device for what `virtio::balloon` does in the kvm engine: it is about the guest's memory,
/// which is QEMU's.
const FREE_PAGE_REPORTING: [&str; 2] = ["-device", "virtio-balloon-device,free-page-reporting=on"];

/// Words for the command line of kiln's own kernel: what ends the machine, one memory layout for all
/// processes, and no `cmpxchg16b`.
pub const KERNEL_ARGS: &str = "reboot=t norandmaps clearcpuid=cx16";

/// A machine for QEMU to run. The descriptors are inherited by it.
#[derive(Debug)]
pub struct Machine {
    /// Guest memory in MiB.
    pub memory_mib: u64,
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// The kernel: an ELF with a PVH entry, readable for the user that QEMU runs as.
    pub kernel: InheritedFd,
    /// The initial RAM disk, readable likewise.
    pub initrd: Option<InheritedFd>,
    /// The kernel command line; QEMU appends its virtio-mmio devices.
    pub cmdline: String,
    /// Devices that other processes serve.
    pub devices: Vec<Device>,
    /// The kernel is not kiln's own: it may reset the machine through the keyboard controller, which
    /// is there for that only, and QEMU logs resets on standard error, so that [`end`] knows why.
    pub foreign_kernel: bool,
}

/// A device and the Unix stream socket, connected, to the process that serves it over vhost-user.
#[derive(Debug)]
pub enum Device {
    /// virtio-fs with a mount tag.
    Fs {
        /// The tag.
        tag: String,
        /// The connection.
        socket: InheritedFd,
    },
    /// virtio-vsock.
    Vsock {
        /// The connection.
        socket: InheritedFd,
    },
    /// virtio-blk.
    Block {
        /// The connection.
        socket: InheritedFd,
    },
    /// virtio-net.
    Net {
        /// The name of the Unix stream socket, *listening*, to which QEMU connects: an `O_PATH`
        /// descriptor of it. QEMU's network back-end takes no connection that it has not made.
        address: InheritedFd,
        /// The address of the guest's interface.
        mac: [u8; 6],
        /// Its MTU.
        mtu: Option<u16>,
    },
}

impl Device {
    /// QEMU's arguments for the device, on a character device of that name.
    pub fn arguments(&self, name: &str) -> Vec<String> {
        let mut arguments = vec!["-chardev".to_owned(), self.connection(name)];
        if let Some(back_end) = self.back_end(name) {
            arguments.extend(["-netdev".to_owned(), back_end]);
        }
        arguments.extend(["-device".to_owned(), self.definition(name)]);
        arguments
    }

    /// The value of `-chardev`, for the character device of that name.
    fn connection(&self, name: &str) -> String {
        match self {
            Self::Fs { socket, .. } | Self::Vsock { socket } | Self::Block { socket } => {
                format!("socket,id={name},fd={}", socket.0)
            }
            Self::Net { address, .. } => format!("socket,id={name},path={}", path_of(*address)),
        }
    }

    /// The value of `-netdev`, if it needs one, on the character device of that name.
    fn back_end(&self, chardev: &str) -> Option<String> {
        match self {
            Self::Net { .. } => Some(format!("vhost-user,id=net-{chardev},chardev={chardev}")),
            _ => None,
        }
    }

    /// The value of `-device`, on the character device of that name.
    fn definition(&self, chardev: &str) -> String {
        match self {
            Self::Net { mac, mtu, .. } => {
                let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
                let mtu = mtu.map(|mtu| format!(",host_mtu={mtu}")).unwrap_or_default();
                format!("virtio-net-device,netdev=net-{chardev},mac={mac}{mtu},{NO_CONTROL_QUEUE}")
            }
            Self::Fs { tag, .. } => {
                let (tag, queues) = (escaped(tag), crate::virtio::fs::QUEUES - 1);
                format!(
                    "vhost-user-fs-device,chardev={chardev},tag={tag},num-request-queues={queues}"
                )
            }
            Self::Vsock { .. } => format!("vhost-user-vsock-device,chardev={chardev}"),
            Self::Block { .. } => format!("vhost-user-blk,chardev={chardev}"),
        }
    }
}

/// A value inside of a comma-separated option: QEMU reads a doubled comma as one.
fn escaped(value: &str) -> String {
    value.replace(',', ",,")
}

impl Machine {
    /// QEMU's arguments. The serial console is on its standard input and output.
    pub fn arguments(&self) -> Vec<String> {
        let memory = format!("{}M", self.memory_mib);
        let mut arguments = Vec::new();
        let mut add = |option: &str, value: &str| {
            arguments.push(option.to_owned());
            if !value.is_empty() {
                arguments.push(value.to_owned());
            }
        };
        add("-nodefaults", "");
        add("-no-user-config", "");
        add("-no-reboot", "");
        add("-display", "none");
        add("-monitor", "none");
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny");
        add("-M", "microvm,rtc=on,acpi=off,memory-backend=memory");
        add("-global", "virtio-mmio.force-legacy=false");
        add("-accel", "tcg,thread=multi");
        add("-cpu", "max,-erms,-fsrm");
        add("-smp", &self.cpus.to_string());
        add("-m", &memory);
        add("-object", &format!("memory-backend-memfd,id=memory,size={memory},share=on"));
        add("-kernel", &path_of(self.kernel));
        if let Some(initrd) = self.initrd {
            add("-initrd", &path_of(initrd));
        }
        add("-append", &self.cmdline);
        add("-chardev", "stdio,id=console,signal=off");
        add("-serial", "chardev:console");
        add("-device", &format!("isa-debug-exit,iobase={POWER_OFF_PORT:#x},iosize=4"));
        if self.foreign_kernel {
            add("-device", "i8042");
            add("-d", "cpu_reset");
        }
        let devices = self.devices.iter().enumerate();
        arguments.extend(devices.flat_map(|(at, device)| device.arguments(&format!("device{at}"))));
        arguments.extend(FREE_PAGE_REPORTING.map(str::to_owned));
        arguments
    }
}

/// The name under which a process opens a descriptor of its own.
fn path_of(fd: InheritedFd) -> String {
    format!("/proc/self/fd/{}", fd.0)
}

/// What QEMU's end says about its guest, or `None` if QEMU itself failed.
///
/// `status` is QEMU's exit status and `errors` what it wrote to standard error, of which the end is
/// enough.
pub fn end(status: Option<i32>, errors: &str) -> Option<GuestEnd> {
    let last_reset = errors.rfind("CPU Reset").unwrap_or(0);
    let fault = errors.rfind(TRIPLE_FAULT);
    match status {
        Some(0) if fault.is_some() => Some(GuestEnd::TripleFault),
        Some(0) => Some(GuestEnd::Reset),
        // The second is the dynamic linker's.
        Some(1 | 127) if says_failure(&errors[last_reset..]) => None,
        Some(code) if code % 2 == 1 => Some(GuestEnd::Shutdown),
        _ => None,
    }
}

/// Whether QEMU explains a failure.
fn says_failure(errors: &str) -> bool {
    messages(errors).next().is_some()
}

/// QEMU's own messages among what it wrote to standard error, and its dynamic linker's: they begin
/// with the name or the path that it was started by, which the reset log's lines don't.
pub fn messages(errors: &str) -> impl Iterator<Item = &str> {
    errors.lines().filter(|line| {
        let name = line.split_once(": ").and_then(|(path, _)| path.rsplit('/').next());
        name.is_some_and(|name| name.starts_with("qemu"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_on_connected_sockets() {
        let machine = Machine {
            memory_mib: 512,
            cpus: 2,
            kernel: InheritedFd(7),
            initrd: Some(InheritedFd(8)),
            cmdline: "console=ttyS0,115200 quiet".to_owned(),
            devices: vec![
                Device::Fs { tag: "a,b".to_owned(), socket: InheritedFd(9) },
                Device::Vsock { socket: InheritedFd(10) },
                Device::Net {
                    address: InheritedFd(11),
                    mac: [2, 0, 0, 0, 0, 0xab],
                    mtu: Some(9000),
                },
            ],
            foreign_kernel: false,
        };
        let arguments = machine.arguments();
        let has = |option: &str, value: &str| {
            arguments.windows(2).any(|pair| pair[0] == option && pair[1] == value)
        };
        assert!(has("-append", "console=ttyS0,115200 quiet"));
        assert!(has("-kernel", "/proc/self/fd/7"));
        assert!(has("-chardev", "socket,id=device0,fd=9"));
        assert!(has(
            "-device",
            "vhost-user-fs-device,chardev=device0,tag=a,,b,num-request-queues=2"
        ));
        assert!(has("-device", "vhost-user-vsock-device,chardev=device1"));
        assert!(has("-chardev", "socket,id=device2,path=/proc/self/fd/11"));
        assert!(has("-netdev", "vhost-user,id=net-device2,chardev=device2"));
        assert!(arguments.iter().any(|argument| argument.starts_with(
            "virtio-net-device,netdev=net-device2,mac=02:00:00:00:00:ab,host_mtu=9000,"
        )));
        assert!(has("-device", "isa-debug-exit,iobase=0x501,iosize=4"));
    }

    #[test]
    fn ends_are_told_apart() {
        let log = "CPU Reset (CPU 0)\nEAX=00000000\n";
        assert_eq!(end(Some(33), log), Some(GuestEnd::Shutdown));
        assert_eq!(end(Some(1), log), Some(GuestEnd::Shutdown));
        assert_eq!(end(Some(0), log), Some(GuestEnd::Reset));
        let fault = format!("{log}Triple fault\n{log}");
        assert_eq!(end(Some(0), &fault), Some(GuestEnd::TripleFault));
        assert_eq!(end(Some(1), "qemu-system-x86_64: no such thing\n"), None);
        let unloaded =
            "/usr/bin/qemu-system-x86_64: error while loading shared libraries: libz.so.1\n";
        assert_eq!(end(Some(127), unloaded), None);
        assert_eq!(end(None, log), None);
    }
}
