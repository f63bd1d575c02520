//! Who a jailed process is.
//!
//! With root, every sandbox has a user and group of its own, the same number for both, that no one
//! else on the host has at the time: [`FIRST_ID`] plus the monitor's pid. The range lies above what
//! distributions, `useradd`, subordinate ids and systemd's dynamic and container users take (its
//! list: <https://systemd.io/UIDS-GIDS>), and spans 63 times the largest pid. Which 63rd is decided
//! by the monitor's pid namespace: the host's own takes the first, others one of the rest by their
//! inode number. So two monitors share an id only if they run in different containers that both
//! lack a user namespace, have the same pid, and fall onto the same of 62; they then still can't
//! reach each other, for the jail does not rest on the id alone.
//!
//! Without root a sandbox's processes keep their starter's id, in a user namespace that knows no
//! other.

use std::fs;
use std::os::unix::fs::MetadataExt;

use capctl::caps::{Cap, CapState};
use nix::unistd::{Gid, Uid, getegid, geteuid, setgroups, setresgid, setresuid};

use super::error::{During, JailError};
use crate::config::JailConfig;

/// The first id of the range.
pub const FIRST_ID: u32 = 0x7000_0000;
/// Above every pid: `PID_MAX_LIMIT` of `include/linux/threads.h`.
const PIDS: u32 = 1 << 22;
/// How many pid namespaces have ids of their own; the range ends before `0x7ffe_0000`, where
/// systemd's next one begins.
const NAMESPACES: u32 = 63;
/// `PROC_PID_INIT_INO` of `include/linux/proc_ns.h`: the host's own pid namespace.
const INITIAL_PID_NAMESPACE: u64 = 0xeffffffc;

/// The identity for the jailed processes of the sandbox whose monitor is the calling process. It
/// is the sandbox's alone until that process has ended.
///
/// # Errors
/// `/proc/self/ns/pid` can't be read.
pub fn allocate() -> Result<JailConfig, JailError> {
    if !may_change() {
        return Ok(JailConfig { uid: geteuid().as_raw(), gid: getegid().as_raw() });
    }
    let namespace = fs::metadata("/proc/self/ns/pid").during("read /proc/self/ns/pid")?.ino();
    let id = id_for(std::process::id(), namespace);
    Ok(JailConfig { uid: id, gid: id })
}

fn id_for(pid: u32, pid_namespace: u64) -> u32 {
    let slot = if pid_namespace == INITIAL_PID_NAMESPACE {
        0
    } else {
        1 + (pid_namespace % u64::from(NAMESPACES - 1)) as u32
    };
    FIRST_ID + slot * PIDS + pid % PIDS
}

/// Whether the calling process may take on another identity.
#[must_use]
pub fn may_change() -> bool {
    CapState::get_current().is_ok_and(|state| {
        [Cap::SETUID, Cap::SETGID].into_iter().all(|cap| state.effective.has(cap))
    })
}

/// Checks that `identity` is one that a jailed process can have, and this process can take on.
///
/// # Errors
/// It is root's, or another's and the process has no right to it.
pub fn check(identity: JailConfig) -> Result<(), JailError> {
    let JailConfig { uid, gid } = identity;
    if uid == 0 || gid == 0 {
        return Err(JailError::Root { uid, gid });
    }
    let (own_uid, own_gid) = (geteuid().as_raw(), getegid().as_raw());
    if !may_change() && (uid, gid) != (own_uid, own_gid) {
        return Err(JailError::ForeignIdentity { uid, gid, own_uid, own_gid });
    }
    Ok(())
}

/// Takes the identity on: all three user and group ids, and no supplementary group.
///
/// # Errors
/// The kernel refuses: no `CAP_SETUID` or `CAP_SETGID`, or a user namespace without the ids.
pub fn take_on(identity: JailConfig) -> Result<(), JailError> {
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    setgroups(&[]).during("give up the supplementary groups")?;
    setresgid(gid, gid, gid).during("take on the sandbox's group id")?;
    setresuid(uid, uid, uid).during("take on the sandbox's user id")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_stay_within_their_range() {
        assert_eq!(id_for(17, INITIAL_PID_NAMESPACE), FIRST_ID + 17);
        for namespace in [0, 61, 62, 4_026_531_999, u64::MAX] {
            let id = id_for(PIDS - 1, namespace);
            assert!((FIRST_ID + PIDS..0x7ffe_0000).contains(&id), "{id:#x}");
        }
    }

    #[test]
    fn root_is_refused() {
        let refused = check(JailConfig { uid: 0, gid: 5 });
        assert!(matches!(refused, Err(JailError::Root { uid: 0, gid: 5 })));
    }
}
