//! What the processes that a caller sees give up. They keep their caller's user, whose they are, and what
//! they can't do without.

use anyhow::Context;
use capctl::caps::{Cap, CapSet, CapState, ambient};
use kiln_vmm::jail::seccomp::denied;
use kiln_vmm::jail::{capabilities, hardening, landlock};
use nix::sys::resource::{Resource, setrlimit};

/// Powers over the machine as a whole, of which neither a monitor nor what it starts has any use.
const OVER_THE_MACHINE: [Cap; 20] = [
    Cap::AUDIT_CONTROL,
    Cap::AUDIT_READ,
    Cap::AUDIT_WRITE,
    Cap::BLOCK_SUSPEND,
    Cap::BPF,
    Cap::CHECKPOINT_RESTORE,
    Cap::LEASE,
    Cap::LINUX_IMMUTABLE,
    Cap::MAC_ADMIN,
    Cap::MAC_OVERRIDE,
    Cap::NET_BROADCAST,
    Cap::PERFMON,
    Cap::SYSLOG,
    Cap::SYS_BOOT,
    Cap::SYS_MODULE,
    Cap::SYS_PACCT,
    Cap::SYS_RAWIO,
    Cap::SYS_TIME,
    Cap::SYS_TTY_CONFIG,
    Cap::WAKE_ALARM,
];

/// Restrains the monitor, for good: no core dumps, no new privileges, no power over the machine as a
/// whole. It stays dumpable, for callers look below its `/proc/PID`. The process has one thread.
///
/// # Errors
/// The kernel refuses.
pub fn of_monitor() -> anyhow::Result<()> {
    without_core_dumps()?;
    hardening::no_new_privileges()?;
    let given_up: CapSet = OVER_THE_MACHINE.into_iter().collect();
    capabilities::drop_from_bounding_set(given_up).context("give up capabilities")?;
    keep(!given_up)
}

/// Restrains a process that stands for a program in a guest, for good: it copies bytes. It has no
/// capability but to write a pid file wherever that may be, reaches nobody that it isn't connected to,
/// and a list of system calls is closed to it. The process has one thread.
///
/// # Errors
/// The kernel refuses.
pub fn of_proxy(writes_pid_file: bool) -> anyhow::Result<()> {
    bare(if writes_pid_file { &[Cap::DAC_OVERRIDE] } else { &[] })
}

/// Restrains a process that is there to be killed, for good: as one that stands for a program in a guest.
///
/// # Errors
/// The kernel refuses.
pub fn of_victim() -> anyhow::Result<()> {
    bare(&[])
}

fn bare(kept: &[Cap]) -> anyhow::Result<()> {
    without_core_dumps()?;
    hardening::no_new_privileges()?;
    keep(kept.iter().copied().collect())?;
    landlock::deny_beyond_files()?;
    Ok(denied::install()?)
}

fn without_core_dumps() -> anyhow::Result<()> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("forbid core dumps")
}

/// Gives up every capability that isn't among these, and all inheritable and ambient ones.
fn keep(kept: CapSet) -> anyhow::Result<()> {
    const STEP: &str = "give up capabilities";
    ambient::clear().context(STEP)?;
    let mut state = CapState::get_current().context(STEP)?;
    state.permitted &= kept;
    state.effective &= kept;
    state.inheritable = CapSet::empty();
    state.set_current().context(STEP)
}
