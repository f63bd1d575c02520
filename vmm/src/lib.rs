//! kiln's virtual machine monitor.
//!
//! # Shape
//! * [`virtio`]: the devices. A device knows queues and guest memory, not what carries them.
//! * [`transport`]: what carries them: `mmio` to the kvm engine's guest, `vhost_user` to QEMU.
//! * [`kvm`]: the kvm engine's machine; [`memory`]: its guest's memory.
//! * [`jail`]: what each process gives up before it reads what a guest wrote.
//! * `fuzzing`, a feature: what fuzzers call of what is nobody else's business.
//! * [`config`]: what a vmm process is told when it starts, every resource as an inherited fd.
//!
//! # Trust
//! The guest is hostile: every address, length, index and count that comes from it is checked, and
//! arithmetic on them is checked arithmetic. A device that finds its driver breaking the rules
//! stops with an error of its own and harms no other device.

mod borrow;
pub mod config;
pub mod emulated;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod jail;
pub mod kvm;
mod log_limit;
pub mod memory;
mod sync;
pub mod transport;
pub mod virtio;

/// Guest memory, as every device and transport sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;
