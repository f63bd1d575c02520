//! The kvm engine: a virtual machine of the host's KVM.
//!
//! # Promises
//! * A machine holds what was asked for and nothing else: memory in one shared file, up to 32
//!   processors found through an MP table, interrupt controllers in the kernel, the virtio-mmio
//!   devices that its command line announces, a serial port if it was given one, and the few ports
//!   by which a guest ends. No PCI, no ACPI, no firmware.
//! * However a guest ends, [`Machine::run`] says how, with every thread that it started gone. What
//!   KVM can't run is described by the exit's name and data, the failing instruction and the
//!   registers.
//! * A [`Vm`] and the descriptors of devices are all that has to be there before a process puts
//!   itself into its jail; what is made of them needs no privilege, and threads begin only in
//!   [`Machine::run`].
//!
//! # Refuses
//! A guest that reads or writes where nothing is gets all-ones and is none the wiser; the first
//! such accesses are logged. Nothing that it does ends another guest or blocks the host's side.

pub(crate) mod boot;
mod cpuid;
mod exits;
mod host;
mod kick;
pub mod layout;
mod machine;
mod ports;
mod process;
mod registers;
mod resident;
mod serial;
mod vcpu;
mod vm;
mod workers;

#[cfg(test)]
mod tests;

pub use boot::{BootError, EntryPoint, Kernel};
pub use host::check_host;
pub use machine::{ExitHook, Machine, Stopper, Until};
pub use process::{run, run_alone};
pub use vm::Vm;
pub use workers::DeviceGroup;

/// The most processors that a machine can have.
pub const MAX_CPUS: u8 = 32;

/// Why a machine could not be made or run.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The host's KVM is one that kiln does not know how to use.
    #[error("/dev/kvm: {0}")]
    Unsupported(String),
    /// A number of processors that no machine can have.
    #[error("{0} vCPUs: it must be between 1 and {MAX_CPUS}")]
    Cpus(u8),
    /// More devices than a machine has interrupt lines for.
    #[error(
        "more than {max} virtio devices: have fewer disks and network interfaces",
        max = layout::MAX_DEVICES
    )]
    TooManyDevices,
    /// A call to KVM failed.
    #[error("cannot {what}")]
    Ioctl {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// An operating system resource other than KVM's.
    #[error("cannot {what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] crate::memory::MemoryError),
    /// What is booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// A descriptor of the configuration.
    #[error("file descriptor {number} of the configuration {problem}")]
    Descriptor {
        /// Its number.
        number: i32,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The process could not jail itself.
    #[error("cannot enter the jail: {0}")]
    Jail(String),
    /// A device can't be made of what the configuration has for it.
    #[error("{name}: {reason}")]
    Device {
        /// Which.
        name: String,
        /// Why.
        reason: String,
    },
    /// The process that serves a share is gone.
    #[error("the process that serves the share {0:?} ended before the guest")]
    ShareLost(String),
    /// It was told to stop before the guest ended.
    #[error("stopped before the guest ended")]
    Stopped,
}

impl KvmError {
    fn ioctl(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |e| Self::Ioctl { what, source: e.into() }
    }

    fn host<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> Self {
        move |e| Self::Host { what, source: e.into() }
    }
}
