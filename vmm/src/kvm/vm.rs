//! A VM of KVM's.

use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};

use kvm_bindings::{
    KVM_API_VERSION, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestMemory as _, GuestMemoryRegion};

use super::{KvmError, layout};
use crate::GuestMemory;

/// A VM of KVM's with its interrupt controllers: what a machine begins with.
///
/// Creating it starts work in the kernel that goes on for milliseconds and that giving memory to the
/// VM waits for (`kvm->srcu` in virt/kvm/kvm_main.c): it comes first, before the process jails
/// itself. To give the memory before that work begins doesn't help: the end of the VM would wait for
/// it, and for longer, since nothing hurries it then.
pub struct Vm {
    pub(super) kvm: Kvm,
    pub(super) fd: VmFd,
    pub(super) tsc_deadline: bool,
}

impl Vm {
    /// Creates one of `/dev/kvm`, opened.
    ///
    /// # Errors
    /// A host that can't give what it takes.
    pub fn create(kvm: OwnedFd) -> Result<Self, KvmError> {
        // SAFETY: the descriptor is owned, and handed over.
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        check(&kvm)?;
        let fd = kvm.create_vm().map_err(KvmError::ioctl("create a VM"))?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        add_interrupt_controllers(&fd, !tsc_deadline)?;
        Ok(Self { kvm, fd, tsc_deadline })
    }

    /// The descriptors that a machine is made with: `/dev/kvm`'s and the VM's.
    pub fn descriptors(&self) -> [RawFd; 2] {
        [self.kvm.as_raw_fd(), self.fd.as_raw_fd()]
    }
}

pub(super) fn check(kvm: &Kvm) -> Result<(), KvmError> {
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(KvmError::Unsupported(format!(
            "it speaks version {version} of the API, kiln speaks {KVM_API_VERSION}"
        )));
    }
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::Ioeventfd, "ioeventfd"),
        (Cap::Irqfd, "irqfd"),
        (Cap::ImmediateExit, "immediate_exit"),
    ];
    match needed.into_iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some((_, name)) => Err(KvmError::Unsupported(format!("it lacks {name}"))),
        None => Ok(()),
    }
}

/// Gives the VM its memory.
///
/// # Errors
/// The host is out of what it takes.
pub(super) fn add_memory(vm: &VmFd, memory: &GuestMemory) -> Result<(), KvmError> {
    for (slot, region) in memory.iter().enumerate() {
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is as long as the slot says and outlives the VM: who holds that holds
        // the memory too, and the threads of its processors until they are gone.
        unsafe { vm.set_user_memory_region(slot) }
            .map_err(KvmError::ioctl("give guest memory to the VM"))?;
    }
    Ok(())
}

/// The interrupt controllers, and the interval timer where kernels need it as their clock: with a
/// deadline timer in each local APIC and kvmclock they don't.
fn add_interrupt_controllers(vm: &VmFd, interval_timer: bool) -> Result<(), KvmError> {
    vm.set_tss_address(layout::KVM_TSS).map_err(KvmError::ioctl("place KVM's task state"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(KvmError::ioctl("place KVM's identity map"))?;
    vm.create_irq_chip().map_err(KvmError::ioctl("create the interrupt controllers"))?;
    if interval_timer {
        let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(config).map_err(KvmError::ioctl("create the interval timer"))?;
    }
    Ok(())
}
