//! The processes of a sandbox on the host, found by `/proc` alone: one whose monitor doesn't answer
//! has them too.

use std::io;

use crate::procfs::{self, Stat};
use crate::state::Monitor;

/// A process of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostProcess {
    /// What it does, in one word. Those that the monitor started choose their names themselves.
    pub role: &'static str,
    /// Its process id.
    pub pid: i32,
    /// What is known of it.
    pub stat: Stat,
}

/// The processes of the host at one moment.
#[derive(Debug)]
pub struct Snapshot(Vec<(i32, Stat)>);

impl Snapshot {
    /// Takes it.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn take() -> io::Result<Self> {
        Ok(Self(procfs::all()?))
    }

    /// A monitor and what it started, and the processes that stand for its execs. None, if the
    /// monitor has ended.
    pub fn of(&self, monitor: Monitor, execs: &[i32]) -> Vec<HostProcess> {
        if !self.0.iter().any(|(pid, stat)| *pid == monitor.pid && monitor.is(stat)) {
            return Vec::new();
        }
        let role = |pid: i32, stat: &Stat| {
            if pid == monitor.pid {
                Some("monitor")
            } else if stat.parent == monitor.pid {
                Some(role_of(&stat.name))
            } else {
                execs.contains(&pid).then_some("exec")
            }
        };
        let members = self.0.iter().filter(|(_, stat)| stat.is_alive());
        members
            .filter_map(|(pid, stat)| {
                Some(HostProcess { role: role(*pid, stat)?, pid: *pid, stat: stat.clone() })
            })
            .collect()
    }
}

/// What a process that calls itself so does.
fn role_of(name: &str) -> &'static str {
    match name {
        "kiln-fs" => "fs",
        "kiln-vmm" => "vmm",
        "kiln-devices" => "devices",
        name if name.starts_with("qemu") => "qemu",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stat(name: &str, parent: i32, state: u8) -> Stat {
        Stat { name: name.to_owned(), state, parent, user: 0, system: 0, started: 5 }
    }

    #[test]
    fn a_monitors_kin_is_told_from_everybody_elses() {
        let snapshot = Snapshot(vec![
            (10, stat("kiln-monitor", 1, b'S')),
            (11, stat("kiln-fs", 10, b'S')),
            (12, stat("qemu-system-x86", 10, b'R')),
            (13, stat("kiln-vmm", 10, b'Z')),
            (14, stat("kiln-fs", 9, b'S')),
            (15, stat("kiln-exec", 1, b'S')),
            (16, stat("kiln-exec", 1, b'S')),
            (17, stat("\n{", 10, b'S')),
        ]);
        let monitor = Monitor { pid: 10, started: 5 };
        let found = snapshot.of(monitor, &[15]);
        let found: Vec<_> = found.iter().map(|process| (process.role, process.pid)).collect();
        let expected = [("monitor", 10), ("fs", 11), ("qemu", 12), ("exec", 15), ("other", 17)];
        assert_eq!(found, expected);
        assert_eq!(snapshot.of(Monitor { started: 7, ..monitor }, &[15]), []);
    }
}
