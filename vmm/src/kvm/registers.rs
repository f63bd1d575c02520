//! The state in which the first processor begins. The others wait for the kernel's start-up IPI in
//! the state that KVM gave them.

use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::boot::EntryPoint;
use super::{KvmError, layout};
use crate::GuestMemory;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The bit of `rflags` that is always set.
const RFLAGS_FIXED: u64 = 1 << 1;

/// Selectors of the boot GDT, the ones that Linux's boot protocols ask for (`__BOOT_CS`,
/// `__BOOT_DS`).
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Type fields of segment descriptors (Intel SDM volume 3, 3.4.5.1 and 3.5): accessed.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// Sets every register of the first processor for `entry`.
pub(super) fn set_boot_state(
    vcpu: &VcpuFd,
    memory: &GuestMemory,
    entry: EntryPoint,
) -> Result<(), KvmError> {
    set_model_specific(vcpu)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(KvmError::ioctl("set a vCPU's FPU state"))?;
    let mut sregs = vcpu.get_sregs().map_err(KvmError::ioctl("get a vCPU's registers"))?;
    set_segments(&mut sregs, memory, entry)?;
    vcpu.set_sregs(&sregs).map_err(KvmError::ioctl("set a vCPU's segments"))?;
    vcpu.set_regs(&general(entry)).map_err(KvmError::ioctl("set a vCPU's registers"))?;
    set_local_interrupts(vcpu)
}

fn general(entry: EntryPoint) -> kvm_regs {
    let regs = kvm_regs { rflags: RFLAGS_FIXED, ..Default::default() };
    match entry {
        EntryPoint::Linux64 { rip } => kvm_regs {
            rip,
            rsi: layout::ZERO_PAGE,
            rsp: layout::BOOT_STACK,
            rbp: layout::BOOT_STACK,
            ..regs
        },
        EntryPoint::Pvh { eip } => {
            kvm_regs { rip: eip.into(), rbx: layout::PVH_START_INFO, ..regs }
        }
    }
}

fn set_segments(
    sregs: &mut kvm_sregs,
    memory: &GuestMemory,
    entry: EntryPoint,
) -> Result<(), KvmError> {
    let long_mode = matches!(entry, EntryPoint::Linux64 { .. });
    let code = kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: CODE,
        type_: TYPE_CODE,
        present: 1,
        s: 1,
        g: 1,
        l: long_mode.into(),
        db: (!long_mode).into(),
        ..Default::default()
    };
    let data = kvm_segment { selector: DATA, type_: TYPE_DATA, l: 0, db: 1, ..code };
    let task = kvm_segment {
        limit: 0x67,
        selector: TASK,
        type_: TYPE_BUSY_TSS,
        present: 1,
        ..Default::default()
    };
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;

    let table = [0, 0, descriptor(&code), descriptor(&data), descriptor(&task)];
    let bytes: Vec<u8> = table.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    memory
        .write_slice(&bytes, GuestAddress(layout::GDT))
        .map_err(|_| super::BootError::MemoryTooSmall("the GDT"))?;
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = bytes.len() as u16 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;

    if long_mode {
        sregs.cr3 = layout::PAGE_TABLES;
        sregs.cr4 = CR4_PAE;
        sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
        sregs.efer = EFER_LME | EFER_LMA;
    } else {
        sregs.cr4 = 0;
        sregs.cr0 = CR0_PE | CR0_ET;
        sregs.efer = 0;
    }
    Ok(())
}

/// A segment as a GDT holds it (Intel SDM volume 3, 3.4.5).
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.avl)
        | u64::from(segment.l) << 1
        | u64::from(segment.db) << 2
        | u64::from(segment.g) << 3;
    let base = segment.base;
    limit & 0xffff
        | (base & 0xff_ffff) << 16
        | access << 40
        | (limit >> 16 & 0xf) << 48
        | flags << 52
        | (base >> 24 & 0xff) << 56
}

/// The model-specific registers that firmware sets and a kernel expects.
fn set_model_specific(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
    const MTRRS_ENABLED: u64 = 1 << 11;
    const WRITE_BACK: u64 = 6;

    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let entries =
        [entry(MISC_ENABLE, FAST_STRINGS), entry(MTRR_DEFAULT_TYPE, MTRRS_ENABLED | WRITE_BACK)];
    let msrs = Msrs::from_entries(&entries)
        .map_err(|_| KvmError::Unsupported("too many model-specific registers".into()))?;
    let set =
        vcpu.set_msrs(&msrs).map_err(KvmError::ioctl("set a vCPU's model-specific registers"))?;
    match entries.get(set) {
        None => Ok(()),
        Some(refused) => Err(KvmError::Unsupported(format!(
            "it refuses the model-specific register {:#x}",
            refused.index
        ))),
    }
}

/// Local interrupt lines as the MP specification has them at boot: LINT0 takes what the 8259s
/// deliver, LINT1 is the NMI.
fn set_local_interrupts(vcpu: &VcpuFd) -> Result<(), KvmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4 << 8;
    const MODE_EXTERNAL: u32 = 7 << 8;

    let mut lapic = vcpu.get_lapic().map_err(KvmError::ioctl("get a vCPU's local APIC"))?;
    set_delivery_mode(&mut lapic, LVT_LINT0, MODE_EXTERNAL);
    set_delivery_mode(&mut lapic, LVT_LINT1, MODE_NMI);
    vcpu.set_lapic(&lapic).map_err(KvmError::ioctl("set a vCPU's local APIC"))
}

/// Sets a local vector table entry's mode and unmasks it.
fn set_delivery_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    for (byte, value) in lapic.regs[register..register + 4].iter_mut().zip(mode.to_le_bytes()) {
        *byte = value as _;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_usual_flat_ones() {
        let flat = kvm_segment {
            limit: 0xffff_ffff,
            type_: TYPE_CODE,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        assert_eq!(descriptor(&flat), 0x00af_9b00_0000_ffff);
        let data = kvm_segment { type_: TYPE_DATA, l: 0, db: 1, ..flat };
        assert_eq!(descriptor(&data), 0x00cf_9300_0000_ffff);
        let task = kvm_segment {
            base: 0x1234_5678,
            limit: 0x67,
            type_: TYPE_BUSY_TSS,
            present: 1,
            ..Default::default()
        };
        assert_eq!(descriptor(&task), 0x1200_8b34_5678_0067);
    }
}
