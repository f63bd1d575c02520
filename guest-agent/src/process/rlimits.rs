//! Resource limits (`process.rlimits`, prlimit(2)). The agent sets them on a process from
//! outside, when nothing but the execution of the program is left to do.

use std::io;

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};

use crate::failure::Failure;

/// One limit.
#[derive(Debug, Clone, Copy)]
pub struct Rlimit {
    resource: libc::__rlimit_resource_t,
    soft: u64,
    hard: u64,
    kind: PosixRlimitType,
}

/// Reads `process.rlimits`.
///
/// # Errors
/// A limit given twice, or a soft limit above the hard one, by index.
pub fn from_spec(limits: &[PosixRlimit]) -> Result<Vec<Rlimit>, Failure> {
    let mut read: Vec<Rlimit> = Vec::new();
    for (index, limit) in limits.iter().enumerate() {
        let refuse = |why: &str| {
            Failure::config(format!("process.rlimits[{index}] ({}): {why}", limit.typ()))
        };
        if read.iter().any(|other| other.kind == limit.typ()) {
            return Err(refuse("given twice"));
        }
        if limit.soft() > limit.hard() {
            return Err(refuse("the soft limit is above the hard limit"));
        }
        read.push(Rlimit {
            resource: resource(limit.typ()),
            soft: limit.soft(),
            hard: limit.hard(),
            kind: limit.typ(),
        });
    }
    Ok(read)
}

impl Rlimit {
    /// Sets the limit on a process.
    ///
    /// # Errors
    /// As prlimit(2): `EPERM` for more than the kernel gives anyone.
    pub fn apply(&self, pid: libc::pid_t) -> io::Result<()> {
        let limit = libc::rlimit64 { rlim_cur: self.soft, rlim_max: self.hard };
        // SAFETY: the new limit lives for the call, and no old one is asked for.
        let result =
            unsafe { libc::prlimit64(pid, self.resource, &raw const limit, std::ptr::null_mut()) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// The limit's name.
    pub fn name(&self) -> String {
        self.kind.to_string()
    }
}

fn resource(kind: PosixRlimitType) -> libc::__rlimit_resource_t {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
