//! A processor's thread.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VcpuFd;
use vmm_sys_util::eventfd::EventFd;

use super::exits::{self, Verdict};
use super::machine::{Bus, ExitHook};
use crate::GuestMemory;
use crate::config::GuestEnd;
use crate::jail::seccomp::threads::{Thread, narrow};
use crate::sync::lock;

/// What the processors' threads share with the one that waits for them.
pub(super) struct Shared {
    pub bus: Bus,
    pub memory: GuestMemory,
    pub hook: Option<Mutex<ExitHook>>,
    /// Every processor's thread ends as soon as it sees it.
    pub stop: AtomicBool,
    /// How the guest ended: the first processor that says so is believed.
    pub end: Mutex<Option<GuestEnd>>,
    /// Written to when `end` was set.
    pub ended: EventFd,
}

impl Shared {
    fn end(&self, how: GuestEnd) {
        lock(&self.end).get_or_insert(how);
        // The only failure is a counter at its limit, which wakes just as well.
        let _ = self.ended.write(1);
    }
}

/// Runs a processor until the guest ends or the machine stops. The vCPU is handed back because its
/// `kvm_run` area must live until nobody can kick it any more.
pub(super) fn run(index: usize, mut vcpu: VcpuFd, shared: &Shared) -> VcpuFd {
    narrow(Thread::Processor);
    while !shared.stop.load(Ordering::SeqCst) {
        let verdict = match vcpu.run() {
            Ok(exit) => exits::handle(exit, &shared.bus),
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => continue,
            Err(e) => Verdict::Broken(format!("KVM_RUN failed: {e}")),
        };
        let reason = match verdict {
            Verdict::Continue => continue,
            Verdict::End(how) => {
                shared.end(how);
                break;
            }
            Verdict::Broken(_) | Verdict::BrokenBy(_) if is_hooked(&mut vcpu, shared) => continue,
            Verdict::Broken(reason) => reason,
            Verdict::BrokenBy(kind) => exits::reason(&mut vcpu, kind),
        };
        let registers = exits::describe(&vcpu, index, &shared.memory);
        shared.end(GuestEnd::Broken { reason, registers });
        break;
    }
    vcpu
}

fn is_hooked(vcpu: &mut VcpuFd, shared: &Shared) -> bool {
    shared.hook.as_ref().is_some_and(|hook| lock(hook)(vcpu))
}
