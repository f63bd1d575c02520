//! What a processor's exit from the guest means: something to serve, the guest's end, or a guest
//! that KVM can't run any further, which is described for whoever has to find out why.

use std::fmt::Write as _;

use kvm_bindings::{KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes, GuestAddress};

use super::machine::Bus;
use crate::GuestMemory;
use crate::config::GuestEnd;

/// What follows from an exit.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was served: the guest goes on.
    Continue,
    /// The guest has ended.
    End(GuestEnd),
    /// KVM can't run the guest any further, for this reason.
    Broken(String),
    /// The same, and the reason lies in the vCPU's `kvm_run` area.
    BrokenBy(InKvmRun),
}

/// Exits whose data kvm-ioctls does not hand out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InKvmRun {
    InternalError,
    Unknown,
    Exception,
}

/// Serves an exit.
pub(super) fn handle(exit: VcpuExit<'_>, bus: &Bus) -> Verdict {
    let broken = |reason: String| Verdict::Broken(reason);
    match exit {
        VcpuExit::IoOut(port, data) => match bus.ports.write(port, data) {
            Some(end) => Verdict::End(end),
            None => Verdict::Continue,
        },
        VcpuExit::IoIn(port, data) => {
            bus.ports.read(port, data);
            Verdict::Continue
        }
        VcpuExit::MmioRead(address, data) => {
            bus.read(address, data);
            Verdict::Continue
        }
        VcpuExit::MmioWrite(address, data) => {
            bus.write(address, data);
            Verdict::Continue
        }
        VcpuExit::Shutdown => Verdict::End(GuestEnd::TripleFault),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _) => Verdict::End(GuestEnd::Shutdown),
        VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _) => Verdict::End(GuestEnd::Reset),
        VcpuExit::SystemEvent(kind, data) => {
            broken(format!("KVM_EXIT_SYSTEM_EVENT type {kind} data {data:x?}"))
        }
        // Not asked for, and harmless where a KVM reports them all the same.
        VcpuExit::Intr
        | VcpuExit::IrqWindowOpen
        | VcpuExit::SetTpr
        | VcpuExit::TprAccess
        | VcpuExit::IoapicEoi(_) => Verdict::Continue,
        VcpuExit::Hypercall(call) => {
            const KVM_ENOSYS: u64 = 1000;
            *call.ret = KVM_ENOSYS.wrapping_neg();
            Verdict::Continue
        }
        // A register that is neither KVM's nor ours: the guest gets a #GP.
        VcpuExit::X86Rdmsr(msr) => {
            *msr.error = 1;
            Verdict::Continue
        }
        VcpuExit::X86Wrmsr(msr) => {
            *msr.error = 1;
            Verdict::Continue
        }
        VcpuExit::InternalError => Verdict::BrokenBy(InKvmRun::InternalError),
        VcpuExit::Unknown => Verdict::BrokenBy(InKvmRun::Unknown),
        VcpuExit::Exception => Verdict::BrokenBy(InKvmRun::Exception),
        VcpuExit::FailEntry(reason, cpu) => {
            broken(format!("KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on host cpu {cpu}"))
        }
        VcpuExit::MemoryFault { flags, gpa, size } => broken(format!(
            "KVM_EXIT_MEMORY_FAULT: {size:#x} bytes at guest-physical {gpa:#x}, flags {flags:#x}"
        )),
        VcpuExit::Debug(debug) => broken(format!(
            "KVM_EXIT_DEBUG: exception {} at {:#x}, dr6 {:#x}",
            debug.exception, debug.pc, debug.dr6
        )),
        // With the interrupt controllers in the kernel a halt is the kernel's to wait out.
        VcpuExit::Hlt => broken("KVM_EXIT_HLT".into()),
        VcpuExit::Unsupported(number) => broken(format!("KVM exit {number}, which is not known")),
        other => broken(format!("KVM exit {other:?}, which this machine can't have")),
    }
}

/// Names the reason for an exit from what the kernel left in `kvm_run`.
pub(super) fn reason(vcpu: &mut VcpuFd, kind: InKvmRun) -> String {
    let run = vcpu.get_kvm_run();
    match kind {
        InKvmRun::InternalError => {
            // SAFETY: the exit reason says that this is the member in use; any bytes are valid.
            let error = unsafe { run.__bindgen_anon_1.internal };
            let count = (error.ndata as usize).min(error.data.len());
            internal_error(error.suberror, &error.data[..count])
        }
        InKvmRun::Unknown => {
            // SAFETY: as above.
            let hardware = unsafe { run.__bindgen_anon_1.hw }.hardware_exit_reason;
            format!("KVM_EXIT_UNKNOWN: hardware exit reason {hardware:#x}")
        }
        InKvmRun::Exception => {
            // SAFETY: as above.
            let exception = unsafe { run.__bindgen_anon_1.ex };
            let (number, code) = (exception.exception, exception.error_code);
            format!("KVM_EXIT_EXCEPTION: vector {number}, error code {code:#x}")
        }
    }
}

/// Describes `KVM_EXIT_INTERNAL_ERROR` (Documentation/virt/kvm/api.rst).
fn internal_error(suberror: u32, data: &[u64]) -> String {
    const EMULATION: u32 = 1;
    const HAS_INSTRUCTION: u64 = 1;

    let name = match suberror {
        EMULATION => "instruction emulation failed",
        2 => "an exception during event delivery",
        3 => "an event could not be delivered",
        4 => "an unexpected hardware exit",
        _ => "of an unknown kind",
    };
    let mut text = format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror} ({name})");
    match data {
        [flags, instruction @ ..] if suberror == EMULATION && flags & HAS_INSTRUCTION != 0 => {
            let bytes: Vec<u8> = instruction.iter().flat_map(|word| word.to_le_bytes()).collect();
            if let [size, bytes @ ..] = &bytes[..] {
                let size = usize::from(*size).min(bytes.len()).min(15);
                let _ = write!(text, ", instruction{}", hex(&bytes[..size]));
            }
        }
        [] => {}
        data => {
            let _ = write!(text, ", data {data:x?}");
        }
    }
    text
}

/// A processor's registers as text, one line each group, and the code at its instruction pointer.
pub(super) fn describe(vcpu: &VcpuFd, index: usize, memory: &GuestMemory) -> Vec<String> {
    let mut lines = vec![format!("vcpu {index}")];
    let (Ok(r), Ok(s)) = (vcpu.get_regs(), vcpu.get_sregs()) else {
        lines.push("its registers cannot be read".into());
        return lines;
    };
    lines.push(format!("rip {:016x} rflags {:08x}", r.rip, r.rflags));
    lines.push(format!(
        "rax {:016x} rbx {:016x} rcx {:016x} rdx {:016x}",
        r.rax, r.rbx, r.rcx, r.rdx
    ));
    lines.push(format!(
        "rsi {:016x} rdi {:016x} rsp {:016x} rbp {:016x}",
        r.rsi, r.rdi, r.rsp, r.rbp
    ));
    lines
        .push(format!("r8  {:016x} r9  {:016x} r10 {:016x} r11 {:016x}", r.r8, r.r9, r.r10, r.r11));
    lines.push(format!(
        "r12 {:016x} r13 {:016x} r14 {:016x} r15 {:016x}",
        r.r12, r.r13, r.r14, r.r15
    ));
    lines.push(format!(
        "cr0 {:08x} cr2 {:016x} cr3 {:016x} cr4 {:08x} efer {:x}",
        s.cr0, s.cr2, s.cr3, s.cr4, s.efer
    ));
    for (name, segment) in [("cs", s.cs), ("ss", s.ss), ("ds", s.ds), ("fs", s.fs), ("gs", s.gs)] {
        lines.push(segment_line(name, &segment));
    }
    lines.push(format!(
        "gdt {:016x}+{:x} idt {:016x}+{:x}",
        s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
    ));
    if let Some(code) = code_at(vcpu, s.cs.base.wrapping_add(r.rip), memory) {
        lines.push(format!("code{}", hex(&code)));
    }
    lines
}

fn segment_line(name: &str, segment: &kvm_segment) -> String {
    format!(
        "{name}  selector {:04x} base {:016x} limit {:08x} type {:x} dpl {}",
        segment.selector, segment.base, segment.limit, segment.type_, segment.dpl
    )
}

fn code_at(vcpu: &VcpuFd, address: u64, memory: &GuestMemory) -> Option<[u8; 16]> {
    let translation = vcpu.translate_gva(address).ok().filter(|t| t.valid != 0)?;
    memory.read_obj(GuestAddress(translation.physical_address)).ok()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, " {byte:02x}");
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_emulation_failure_shows_its_instruction() {
        let words = [1, u64::from_le_bytes([3, 0xf3, 0x0f, 0xb8, 0, 0, 0, 0])];
        assert_eq!(
            internal_error(1, &words),
            "KVM_EXIT_INTERNAL_ERROR, suberror 1 (instruction emulation failed), instruction f3 0f b8"
        );
        let lying = [1, u64::from_le_bytes([0xff, 0xcc, 0, 0, 0, 0, 0, 0])];
        assert!(internal_error(1, &lying).ends_with("instruction cc 00 00 00 00 00 00"));
    }

    #[test]
    fn other_internal_errors_show_their_data() {
        assert_eq!(
            internal_error(2, &[0x80000b0e]),
            "KVM_EXIT_INTERNAL_ERROR, suberror 2 (an exception during event delivery), data [80000b0e]"
        );
        assert!(internal_error(9, &[]).ends_with("suberror 9 (of an unknown kind)"));
    }
}
