//! What interrupts ring 3: exceptions, external interrupts, service calls, `SYSCALL`.
//!
//! Ring 0 only notes what happened and returns; judging it is ring 3's business. After an
//! exception ring 3 goes on at the place that [`provoke!`] named, or reports one nobody expected.

use core::arch::global_asm;
use core::sync::atomic::{AtomicU64, Ordering};

use super::tables::{SERVICE_VECTOR, STUB_SIZE, USER_CODE, USER_DATA};

/// The last exception, as ring 0 found it. Only the boot CPU provokes any.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Exception {
    /// How many there were since the guest began.
    pub count: u64,
    /// 0 to 31.
    pub vector: u64,
    /// 0 for vectors without one.
    pub error_code: u64,
    /// Where it happened.
    pub rip: u64,
    /// Code segment; its two low bits are the ring.
    pub cs: u64,
    /// The address that a page fault is about.
    pub cr2: u64,
}

#[repr(C)]
pub struct Traps {
    pub exception: Exception,
    pub resume_rip: u64,
    pub resume_rsp: u64,
    syscalls: u64,
    syscall_cs: u64,
}

pub static mut TRAPS: Traps = Traps {
    exception: Exception { count: 0, vector: 0, error_code: 0, rip: 0, cs: 0, cr2: 0 },
    resume_rip: 0,
    resume_rsp: 0,
    syscalls: 0,
    syscall_cs: 0,
};

static INTERRUPTS: [AtomicU64; 256] = [const { AtomicU64::new(0) }; 256];

/// Runs instructions, the last of which may fault, and gives the [`Exception`] if one did.
#[macro_export]
macro_rules! provoke {
    ($($line:literal),+ $(; $($operand:tt)*)?) => {{
        let before = $crate::rt::trap::last_exception().count;
        // SAFETY: after an exception ring 0 returns to label 2 with the stack as it was; the
        // clobbers cover what the caller of a C function may lose.
        unsafe {
            core::arch::asm!(
                "lea rax, [rip + 2f]",
                "mov [rip + {traps} + {rip_at}], rax",
                "mov [rip + {traps} + {rsp_at}], rsp",
                $($line,)+
                "2:",
                "mov qword ptr [rip + {traps} + {rip_at}], 0",
                traps = sym $crate::rt::trap::TRAPS,
                rip_at = const core::mem::offset_of!($crate::rt::trap::Traps, resume_rip),
                rsp_at = const core::mem::offset_of!($crate::rt::trap::Traps, resume_rsp),
                clobber_abi("sysv64"),
                $($($operand)*)?
            );
        }
        let after = $crate::rt::trap::last_exception();
        if after.count == before { None } else { Some(after) }
    }};
}

/// The last exception.
pub fn last_exception() -> Exception {
    // SAFETY: the field is plain data that only ring 0 writes, while this CPU is in it.
    unsafe { (&raw const TRAPS.exception).read_volatile() }
}

/// How often a vector of 32 or more was delivered.
pub fn interrupts(vector: u8) -> u64 {
    INTERRUPTS[usize::from(vector)].load(Ordering::SeqCst)
}

/// How often `SYSCALL` reached its handler in ring 0, and the code segment it ran with last.
pub fn syscalls() -> (u64, u64) {
    // SAFETY: as in `last_exception`.
    unsafe {
        ((&raw const TRAPS.syscalls).read_volatile(), (&raw const TRAPS.syscall_cs).read_volatile())
    }
}

/// Lets interrupts in.
pub fn enable_interrupts() {
    service(0, 0);
}

/// Keeps interrupts out.
pub fn disable_interrupts() {
    service(1, 0);
}

/// Spends `iterations` of a two-instruction loop in ring 0.
pub fn spin_in_ring0(iterations: u64) {
    service(2, iterations);
}

/// Halts this CPU for good, so that it takes no time from the others.
pub fn park() -> ! {
    service(3, 0);
    unreachable!()
}

fn service(function: u64, argument: u64) {
    // SAFETY: the service changes no register but these and no memory.
    unsafe {
        core::arch::asm!(
            "int3",
            inout("rax") function => _,
            inout("rcx") argument => _,
        );
    }
}

extern "sysv64" fn unexpected() -> ! {
    let exception = last_exception();
    super::report::fail(
        "unexpected exception",
        format_args!(
            "vector {} error {:#x} at {:#x} cs {:#x} cr2 {:#x}",
            exception.vector, exception.error_code, exception.rip, exception.cs, exception.cr2
        ),
    );
    super::report::power_off()
}

global_asm!(
    ".pushsection .stubs, \"ax\"",
    ".balign {stub_size}",
    "vector = 0",
    ".rept 256",
    ".balign {stub_size}",
    ".if vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21",
    ".else",
    "push 0",
    ".endif",
    "push vector",
    ".if vector == {service_vector}",
    "jmp service_entry",
    ".elseif vector < 32",
    "jmp exception_entry",
    ".else",
    "jmp interrupt_entry",
    ".endif",
    "vector = vector + 1",
    ".endr",
    ".popsection",
    ".pushsection .text.traps, \"ax\"",
    // Stack: vector, error code, rip, cs, rflags, rsp, ss.
    "exception_entry:",
    "push rax",
    "mov rax, [rsp + 8]",
    "mov [rip + {traps} + {vector_at}], rax",
    "mov rax, [rsp + 16]",
    "mov [rip + {traps} + {error_at}], rax",
    "mov rax, [rsp + 24]",
    "mov [rip + {traps} + {rip_at}], rax",
    "mov rax, [rsp + 32]",
    "mov [rip + {traps} + {cs_at}], rax",
    "mov rax, cr2",
    "mov [rip + {traps} + {cr2_at}], rax",
    "inc qword ptr [rip + {traps} + {count_at}]",
    "mov rax, [rip + {traps} + {resume_rip_at}]",
    "test rax, rax",
    "jz 3f",
    "mov [rsp + 24], rax",
    "mov rax, [rip + {traps} + {resume_rsp_at}]",
    "mov [rsp + 48], rax",
    "jmp 4f",
    "3:",
    // A stack that is surely good, and aligned as a function expects it.
    "mov eax, offset {unexpected}",
    "mov [rsp + 24], rax",
    "mov eax, offset {emergency_stack} + {emergency_top}",
    "mov [rsp + 48], rax",
    "4:",
    "mov qword ptr [rsp + 32], {user_code}",
    "and qword ptr [rsp + 40], 0x200",
    "or qword ptr [rsp + 40], 2",
    "mov qword ptr [rsp + 56], {user_data}",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "interrupt_entry:",
    "push rax",
    "push rcx",
    "mov rax, [rsp + 16]",
    "movzx eax, al",
    "lea rcx, [rip + {interrupts}]",
    "lock inc qword ptr [rcx + rax * 8]",
    // End of interrupt, to the local APIC.
    "mov eax, 0xfee000b0",
    "mov dword ptr [rax], 0",
    "pop rcx",
    "pop rax",
    "add rsp, 16",
    "iretq",
    "service_entry:",
    "add rsp, 16",
    "cmp eax, 1",
    "jb 5f",
    "je 6f",
    "cmp eax, 3",
    "je 8f",
    "7:",
    "dec rcx",
    "jnz 7b",
    "iretq",
    "5:",
    "or qword ptr [rsp + 16], 0x200",
    "iretq",
    "6:",
    "and qword ptr [rsp + 16], ~0x200",
    "iretq",
    "8:",
    "hlt",
    "jmp 8b",
    // SYSCALL: rcx = where to return, r11 = flags. No stack is needed.
    ".globl syscall_entry",
    "syscall_entry:",
    "inc qword ptr [rip + {traps} + {syscalls_at}]",
    "mov eax, cs",
    "mov [rip + {traps} + {syscall_cs_at}], rax",
    "sysretq",
    ".popsection",
    stub_size = const STUB_SIZE,
    service_vector = const SERVICE_VECTOR,
    traps = sym TRAPS,
    interrupts = sym INTERRUPTS,
    unexpected = sym unexpected,
    emergency_stack = sym EMERGENCY_STACK,
    emergency_top = const EMERGENCY_STACK_SIZE - 8,
    user_code = const USER_CODE,
    user_data = const USER_DATA,
    vector_at = const core::mem::offset_of!(Traps, exception.vector),
    error_at = const core::mem::offset_of!(Traps, exception.error_code),
    rip_at = const core::mem::offset_of!(Traps, exception.rip),
    cs_at = const core::mem::offset_of!(Traps, exception.cs),
    cr2_at = const core::mem::offset_of!(Traps, exception.cr2),
    count_at = const core::mem::offset_of!(Traps, exception.count),
    resume_rip_at = const core::mem::offset_of!(Traps, resume_rip),
    resume_rsp_at = const core::mem::offset_of!(Traps, resume_rsp),
    syscalls_at = const core::mem::offset_of!(Traps, syscalls),
    syscall_cs_at = const core::mem::offset_of!(Traps, syscall_cs),
);

const EMERGENCY_STACK_SIZE: usize = 16 * 1024;

#[repr(C, align(16))]
struct EmergencyStack([u8; EMERGENCY_STACK_SIZE]);

static mut EMERGENCY_STACK: EmergencyStack = EmergencyStack([0; EMERGENCY_STACK_SIZE]);
