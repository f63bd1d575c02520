//! Scheduling of a process: `process.scheduler`, `process.ioPriority`, `linux.personality`.

use std::io;

use oci_spec::runtime::{
    IOPriorityClass, LinuxIOPriority, LinuxPersonality, LinuxPersonalityDomain, LinuxSchedulerFlag,
    LinuxSchedulerPolicy, Scheduler,
};

use crate::failure::Failure;

/// `struct sched_attr` of sched_setattr(2), first version.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerAttributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

/// Reads `process.scheduler`.
///
/// # Errors
/// A policy or flag that the kernel doesn't have, by name.
pub fn scheduler(spec: &Scheduler) -> Result<SchedulerAttributes, Failure> {
    let policy = match spec.policy() {
        LinuxSchedulerPolicy::SchedOther => libc::SCHED_OTHER,
        LinuxSchedulerPolicy::SchedFifo => libc::SCHED_FIFO,
        LinuxSchedulerPolicy::SchedRr => libc::SCHED_RR,
        LinuxSchedulerPolicy::SchedBatch => libc::SCHED_BATCH,
        LinuxSchedulerPolicy::SchedIdle => libc::SCHED_IDLE,
        LinuxSchedulerPolicy::SchedDeadline => libc::SCHED_DEADLINE,
        LinuxSchedulerPolicy::SchedIso => {
            return Err(Failure::config("process.scheduler.policy: Linux has no SCHED_ISO"));
        }
    };
    let mut flags = 0;
    for flag in spec.flags().iter().flatten() {
        flags |= match flag {
            LinuxSchedulerFlag::SchedResetOnFork => 0x01,
            LinuxSchedulerFlag::SchedFlagReclaim => 0x02,
            LinuxSchedulerFlag::SchedFlagDLOverrun => 0x04,
            LinuxSchedulerFlag::SchedFlagKeepPolicy => 0x08,
            LinuxSchedulerFlag::SchedFlagKeepParams => 0x10,
            LinuxSchedulerFlag::SchedFlagUtilClampMin
            | LinuxSchedulerFlag::SchedFlagUtilClampMax => {
                let why = "utilisation clamps have no values in the configuration";
                return Err(Failure::config(format!("process.scheduler.flags: {why}")));
            }
        };
    }
    let priority = spec.priority().unwrap_or(0);
    let priority = u32::try_from(priority)
        .map_err(|_| Failure::config(format!("process.scheduler.priority: {priority}")))?;
    Ok(SchedulerAttributes {
        size: size_of::<SchedulerAttributes>() as u32,
        policy: policy as u32,
        flags,
        nice: spec.nice().unwrap_or(0),
        priority,
        runtime: spec.runtime().unwrap_or(0),
        deadline: spec.deadline().unwrap_or(0),
        period: spec.period().unwrap_or(0),
    })
}

impl SchedulerAttributes {
    /// Applies them to a process.
    ///
    /// # Errors
    /// As sched_setattr(2).
    pub fn apply(&self, pid: libc::pid_t) -> io::Result<()> {
        // SAFETY: the pointer is to a live `struct sched_attr` whose size field is right.
        check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, self, 0) })
    }
}

/// The argument of ioprio_set(2) for `process.ioPriority`.
///
/// # Errors
/// A priority outside 0 to 7.
pub fn io_priority(spec: &LinuxIOPriority) -> Result<libc::c_int, Failure> {
    let class = match spec.class() {
        IOPriorityClass::IoprioClassRt => 1,
        IOPriorityClass::IoprioClassBe => 2,
        IOPriorityClass::IoprioClassIdle => 3,
    };
    let priority = libc::c_int::try_from(spec.priority()).ok().filter(|p| (0..8).contains(p));
    let priority = priority.ok_or_else(|| {
        let why = "must be from 0 to 7";
        Failure::config(format!("process.ioPriority.priority: {}: {why}", spec.priority()))
    })?;
    Ok(class << 13 | priority)
}

/// Gives a process an I/O priority.
///
/// # Errors
/// As ioprio_set(2).
pub fn set_io_priority(pid: libc::pid_t, priority: libc::c_int) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: plain numbers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, priority) })
}

/// Execution domains of linux/personality.h.
const PER_LINUX: libc::c_ulong = 0;
const PER_LINUX32: libc::c_ulong = 8;

/// The argument of personality(2) for `linux.personality`.
///
/// # Errors
/// Flags: the specification has none yet.
pub fn personality(spec: &LinuxPersonality) -> Result<libc::c_ulong, Failure> {
    if spec.flags().as_ref().is_some_and(|flags| !flags.is_empty()) {
        return Err(Failure::config("linux.personality.flags: none is supported"));
    }
    Ok(match spec.domain() {
        LinuxPersonalityDomain::PerLinux => PER_LINUX,
        LinuxPersonalityDomain::PerLinux32 => PER_LINUX32,
    })
}

fn check(result: libc::c_long) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
