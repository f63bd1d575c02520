//! Delivers the breakpoint of an `int3` that KVM fails to emulate, as a processor would (Intel SDM
//! volume 3, 6.14.2: an exception in 64-bit mode, without a change of stack).

use kiln_vmm::GuestMemory;
use kiln_vmm::kvm::ExitHook;
use kvm_bindings::{KVM_EXIT_INTERNAL_ERROR, kvm_regs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

const INT3: u8 = 0xcc;
const BREAKPOINT: u64 = 3;
const GATE_SIZE: u64 = 16;
/// `rflags` bits that an exception clears: TF, NT, RF.
const CLEARED: u64 = 1 << 8 | 1 << 14 | 1 << 16;
const INTERRUPTS_ENABLED: u64 = 1 << 9;
const INTERRUPT_GATE: u8 = 0xe;

/// What a machine shows its unhandled exits to.
pub fn hook(memory: GuestMemory) -> ExitHook {
    Box::new(move |vcpu| deliver(vcpu, &memory).is_some())
}

fn deliver(vcpu: &mut VcpuFd, memory: &GuestMemory) -> Option<()> {
    if vcpu.get_kvm_run().exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    let regs = vcpu.get_regs().ok()?;
    let sregs = vcpu.get_sregs().ok()?;
    let physical = |address: u64| {
        let translation = vcpu.translate_gva(address).ok().filter(|t| t.valid != 0)?;
        Some(GuestAddress(translation.physical_address))
    };
    let instruction: u8 = memory.read_obj(physical(regs.rip)?).ok()?;
    if instruction != INT3 || sregs.cs.selector & 3 != 0 {
        return None;
    }
    let gate: [u8; 16] =
        memory.read_obj(physical(sregs.idt.base + BREAKPOINT * GATE_SIZE)?).ok()?;
    let frame =
        [regs.rip + 1, sregs.cs.selector.into(), regs.rflags, regs.rsp, sregs.ss.selector.into()];
    let stack = (regs.rsp & !0xf) - size_of_val(&frame) as u64;
    for (word, address) in frame.into_iter().zip((stack..).step_by(8)) {
        memory.write_obj(word, physical(address)?).ok()?;
    }
    let mut rflags = regs.rflags & !CLEARED;
    if gate[5] & 0xf == INTERRUPT_GATE {
        rflags &= !INTERRUPTS_ENABLED;
    }
    let handler = kvm_regs { rip: target(&gate), rsp: stack, rflags, ..regs };
    vcpu.set_regs(&handler).ok()
}

/// The handler's address in a 64-bit gate descriptor.
fn target(gate: &[u8; 16]) -> u64 {
    let part = |range: std::ops::Range<usize>| {
        gate[range].iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte))
    };
    part(0..2) | part(6..8) << 16 | part(8..12) << 32
}
