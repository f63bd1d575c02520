//! Numbers of the `ioctl` requests that the lists allow.
//!
//! Sources: `include/uapi/asm-generic/ioctl.h` (how a number is made up),
//! `include/uapi/linux/kvm.h`, `include/uapi/linux/fs.h`, `include/uapi/linux/if_tun.h`.

use kvm_bindings as kvm;

/// `_IO`: no data.
const fn none(kind: u32, number: u32) -> u32 {
    kind << 8 | number
}

/// `_IOW`: the kernel reads a `T`.
const fn writes<T>(kind: u32, number: u32) -> u32 {
    1 << 30 | (size_of::<T>() as u32) << 16 | kind << 8 | number
}

/// `_IOR`: the kernel writes a `T`.
const fn reads<T>(kind: u32, number: u32) -> u32 {
    2 << 30 | (size_of::<T>() as u32) << 16 | kind << 8 | number
}

/// `_IOWR`: the kernel reads and writes a `T`.
const fn exchanges<T>(kind: u32, number: u32) -> u32 {
    3 << 30 | (size_of::<T>() as u32) << 16 | kind << 8 | number
}

/// `KVMIO`.
const KVMIO: u32 = 0xae;

/// What a machine is set up with once its VM was created. Besides these and those of a [`PROCESSOR`] it asks
/// nothing of KVM: not every request of KVM's has seen as many users.
pub const SET_UP: &[u32] = &[
    exchanges::<kvm::kvm_cpuid2>(KVMIO, 0x05), // GET_SUPPORTED_CPUID
    none(KVMIO, 0x41),                         // CREATE_VCPU
    writes::<kvm::kvm_userspace_memory_region>(KVMIO, 0x46), // SET_USER_MEMORY_REGION
    writes::<kvm::kvm_regs>(KVMIO, 0x82),      // SET_REGS
    writes::<kvm::kvm_sregs>(KVMIO, 0x84),     // SET_SREGS
    writes::<kvm::kvm_msrs>(KVMIO, 0x89),      // SET_MSRS
    writes::<kvm::kvm_fpu>(KVMIO, 0x8d),       // SET_FPU
    reads::<kvm::kvm_lapic_state>(KVMIO, 0x8e), // GET_LAPIC
    writes::<kvm::kvm_lapic_state>(KVMIO, 0x8f), // SET_LAPIC
    writes::<kvm::kvm_cpuid2>(KVMIO, 0x90),    // SET_CPUID2
];

/// `KVM_IRQ_LINE`: raises or lowers an interrupt line.
pub const KVM_IRQ_LINE: u32 = writes::<kvm::kvm_irq_level>(KVMIO, 0x61);

/// What a processor's thread asks of KVM: running, connecting devices, looking at a broken vCPU.
pub const PROCESSOR: &[u32] = &[
    none(KVMIO, 0x80), // RUN
    KVM_IRQ_LINE,
    writes::<kvm::kvm_irqfd>(KVMIO, 0x76),          // IRQFD
    writes::<kvm::kvm_ioeventfd>(KVMIO, 0x79),      // IOEVENTFD
    reads::<kvm::kvm_regs>(KVMIO, 0x81),            // GET_REGS
    reads::<kvm::kvm_sregs>(KVMIO, 0x83),           // GET_SREGS
    exchanges::<kvm::kvm_translation>(KVMIO, 0x85), // TRANSLATE
];

/// `FIONBIO`: makes a socket non-blocking, as the standard library does it.
pub const FIONBIO: u32 = 0x5421;
/// `FIONREAD`: how much can be read.
pub const FIONREAD: u32 = 0x541b;
/// `BLKGETSIZE64`: the size of a block device.
pub const BLKGETSIZE64: u32 = reads::<u64>(0x12, 114);
/// `BLKSSZGET`: the size of its sectors.
pub const BLKSSZGET: u32 = none(0x12, 104);
/// `BLKDISCARD`: discards a range.
pub const BLKDISCARD: u32 = none(0x12, 119);
/// `BLKZEROOUT`: writes zeroes to a range.
pub const BLKZEROOUT: u32 = none(0x12, 127);
/// `TUNGETIFF`: what a descriptor of `/dev/net/tun` is attached to.
pub const TUNGETIFF: u32 = libc::TUNGETIFF as u32;
/// `TUNSETOFFLOAD`: which offloads a tap uses.
pub const TUNSETOFFLOAD: u32 = libc::TUNSETOFFLOAD as u32;
/// `TUNSETVNETHDRSZ`: the size of its packet headers.
pub const TUNSETVNETHDRSZ: u32 = libc::TUNSETVNETHDRSZ as u32;
/// `TCGETS`: whether a descriptor is a terminal.
pub const TCGETS: u32 = libc::TCGETS as u32;

#[cfg(test)]
mod tests {
    use super::*;

    // Numbers as strace and the kernel's headers have them.
    #[test]
    fn numbers_are_the_kernel_s() {
        for known in [0xae80, 0x4020_ae46, 0x4040_ae79, 0x4020_ae76, 0xc008_ae05, 0x4090_ae82] {
            assert!(SET_UP.contains(&known) || PROCESSOR.contains(&known), "{known:#x}");
        }
        assert_eq!(BLKGETSIZE64, 0x8008_1272);
        let tap = [TUNGETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ];
        assert_eq!(tap, [0x8004_54d2, 0x4004_54d0, 0x4004_54d8]);
    }
}
