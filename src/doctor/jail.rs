//! What the jails ask of the host's kernel.

use std::fs;

use kiln_vmm::jail::landlock;
use nix::sys::resource::{Resource, getrlimit};

use super::Check;

const SECCOMP: &str = "seccomp";
const LANDLOCK: &str = "landlock";
const MEMORY: &str = "executable memory";
const FILES: &str = "open files";

/// The version of Landlock that has all that the jails ask of it.
const WHOLE_LANDLOCK: u32 = 6;

/// Files that the file system process asks to have open, should it be allowed to.
const WANTED_FILES: u64 = 1 << 20;

/// Files that a shared tree may have known to a guest, below which a large build meets the limit.
const MANY_FILES: u64 = 1 << 19;

/// Does the checks.
pub fn checks() -> Vec<Check> {
    let actions = fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    let landlock = landlock::version().unwrap_or(0);
    vec![seccomp(&actions.unwrap_or_default()), landlock_of(landlock), memory(), files()]
}

fn seccomp(actions: &str) -> Check {
    let has = |action: &str| actions.split_whitespace().any(|known| known == action);
    if has("trap") && has("errno") {
        return Check::ok(SECCOMP, "system calls can be filtered");
    }
    Check::fail(
        SECCOMP,
        "the kernel can't filter system calls: sandboxes can't be jailed",
        "use a kernel with CONFIG_SECCOMP_FILTER",
    )
}

fn landlock_of(version: u32) -> Check {
    let missing = match version {
        WHOLE_LANDLOCK.. => return Check::ok(LANDLOCK, format!("version {version}")),
        0 => "the kernel has none".to_owned(),
        4.. => format!("version {version} knows neither signals nor abstract sockets"),
        _ => format!("version {version} knows no network, signals or abstract sockets"),
    };
    Check::warn(
        LANDLOCK,
        format!(
            "{missing}: what it would refuse once more is refused by the rest of the jail only"
        ),
        "use Linux 6.12 or later, with landlock among the modules of lsm= on its command line",
    )
}

fn memory() -> Check {
    // SAFETY: plain numbers; it only asks.
    let known = unsafe { libc::prctl(libc::PR_GET_MDWE, 0, 0, 0, 0) } >= 0;
    if known {
        return Check::ok(MEMORY, "the kernel keeps writable memory from becoming executable");
    }
    Check::warn(
        MEMORY,
        "the kernel has no memory-deny-write-execute: only seccomp keeps memory from becoming \
         executable",
        "use Linux 6.3 or later",
    )
}

fn files() -> Check {
    let own = getrlimit(Resource::RLIMIT_NOFILE).map_or(0, |(_, hard)| hard);
    let may_raise = capctl::CapState::get_current()
        .is_ok_and(|state| state.effective.has(capctl::Cap::SYS_RESOURCE));
    let ceiling = fs::read_to_string("/proc/sys/fs/nr_open");
    let ceiling = ceiling.ok().and_then(|text| text.trim().parse().ok());
    let most = if may_raise { ceiling.unwrap_or(own).min(WANTED_FILES) } else { own };
    if most >= MANY_FILES {
        return Check::ok(FILES, format!("a guest may know {most} files of a share at a time"));
    }
    Check::warn(
        FILES,
        format!("a guest may know {most} files of a share at a time, and sees ENFILE beyond"),
        "raise the hard limit of open files (ulimit -Hn) of kiln's caller",
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn what_a_kernel_lacks_is_named() {
        assert_eq!(seccomp("kill_process kill_thread errno log allow").status, Status::Fail);
        assert_eq!(seccomp("kill_process trap errno trace log allow").status, Status::Ok);
        let old = landlock_of(4);
        assert_eq!(old.status, Status::Warn);
        assert!(old.explanation.starts_with("version 4 knows neither signals"), "{old:?}");
        assert_eq!(landlock_of(6).status, Status::Ok);
    }

    #[test]
    fn every_check_that_is_not_ok_has_a_mend() {
        for check in checks() {
            assert_eq!(check.mend.is_some(), check.status != Status::Ok, "{check:?}");
        }
    }
}
