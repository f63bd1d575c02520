//! What a cell of the documentation's tables says of a process, as far as `/proc` shows it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use super::{Process, line, namespace};

/// Capabilities by name, as far as the tables name any.
const CAPABILITIES: [(&str, u32); 9] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("FOWNER", 3),
    ("FSETID", 4),
    ("SETGID", 6),
    ("SETUID", 7),
    ("SYS_TIME", 25),
    ("MKNOD", 27),
    ("SETFCAP", 31),
];

/// Those with power over the machine as a whole: SYS_MODULE, SYS_RAWIO, SYS_PACCT, SYS_BOOT, SYS_TIME,
/// SYS_TTY_CONFIG, LEASE, AUDIT_WRITE, AUDIT_CONTROL, MAC_OVERRIDE, MAC_ADMIN, SYSLOG, WAKE_ALARM,
/// BLOCK_SUSPEND, AUDIT_READ, PERFMON, BPF, CHECKPOINT_RESTORE, LINUX_IMMUTABLE, NET_BROADCAST.
const OVER_THE_MACHINE: [u32; 20] =
    [16, 17, 20, 22, 25, 26, 28, 29, 30, 32, 33, 34, 35, 36, 37, 38, 39, 40, 9, 11];

/// Namespaces as the tables and as `/proc/PID/ns` call them.
const NAMESPACES: [(&str, &str); 7] = [
    ("mount", "mnt"),
    ("ipc", "ipc"),
    ("uts", "uts"),
    ("cgroup", "cgroup"),
    ("network", "net"),
    ("pid", "pid"),
    ("user", "user"),
];

/// Rows of what can't be seen from outside, which the hostile programs in the jails' places try, and of
/// what other tests look at.
const ELSEWHERE: [&str; 5] =
    ["securebits", "Landlock", "ends with its parent", "root directory", "namespaces"];

/// Whether a row's cell is true of a process.
pub fn holds(process: &Process, row: &str, cell: &str) -> bool {
    let first = cell.split([' ', ',', ':']).next().unwrap_or(cell);
    match row {
        "user and group" => identity(process, cell),
        "supplementary groups" => cell != "none" || process.status("Groups").is_empty(),
        "capabilities" => capabilities(process, cell),
        "`no_new_privs`" => first != "yes" || every_thread(process, "NoNewPrivs", "1"),
        "core dumps" => process.limit("Max core file size") == "0",
        "open files, at most" => at_most(process, "Max open files", first.parse().ok()),
        "tasks of its user, at most" => at_most(process, "Max processes", first.parse().ok()),
        "allocated memory, at most" => {
            let limit = first.parse().ok().map(|gib: u64| gib << 30);
            at_most(process, "Max data size", limit)
        }
        "namespaces of its own" => namespaces(process, cell),
        // What is below its /proc/PID is root's then, whoever it is itself.
        row if row.starts_with("undumpable") => {
            let owner = fs::metadata(format!("/proc/{}/status", process.pid)).map(|m| m.uid());
            first != "yes" || owner.is_ok_and(|owner| owner == 0)
        }
        "system calls" => every_thread(process, "Seccomp", if first == "any" { "0" } else { "2" }),
        row => ELSEWHERE.contains(&row),
    }
}

fn identity(process: &Process, cell: &str) -> bool {
    match cell {
        "the sandbox's own" => process.check_identity() != 0,
        // The tests' caller is root.
        "root" | "the caller's" => {
            ["Uid", "Gid"].iter().all(|field| process.status(field) == "0 0 0 0")
        }
        _ => false,
    }
}

fn capabilities(process: &Process, cell: &str) -> bool {
    if cell.starts_with("the caller's") {
        let taken: u64 = OVER_THE_MACHINE.iter().map(|bit| 1 << bit).sum();
        let sets = ["CapPrm", "CapEff", "CapBnd"];
        return sets.iter().all(|set| process.capabilities(set) & taken == 0);
    }
    let named = |name: &&str| CAPABILITIES.iter().find(|(known, _)| known == name);
    let names = cell.strip_prefix('`').map_or("", |cell| cell.trim_end_matches('`'));
    let names: Vec<_> = names.split_whitespace().collect();
    let Some(bits) = names.iter().map(named).collect::<Option<Vec<_>>>() else { return false };
    let expected: u64 = bits.iter().map(|(_, bit)| 1 << bit).sum();
    // The process of an exec has no use for the bounding set: it executes nothing.
    let sets: &[&str] = if cell.contains("pid file") {
        &["CapPrm", "CapEff"]
    } else {
        &["CapPrm", "CapEff", "CapBnd"]
    };
    sets.iter().all(|set| process.capabilities(set) == expected)
        && ["CapInh", "CapAmb"].iter().all(|set| process.capabilities(set) == 0)
}

/// Whether a limit is set, and as low; without one anything will do.
fn at_most(process: &Process, limit: &str, value: Option<u64>) -> bool {
    let Some(value) = value else { return true };
    process.limit(limit).parse().is_ok_and(|limit: u64| limit <= value)
}

/// Namespaces that are named are neither the test's nor the starter's, all others are the starter's.
fn namespaces(process: &Process, cell: &str) -> bool {
    let own: Vec<&str> = cell.split(", ").collect();
    let (pid, parent) = (process.pid.to_string(), process.status("PPid"));
    own.iter().all(|name| NAMESPACES.iter().any(|(known, _)| known == name))
        && NAMESPACES.iter().all(|(name, kind)| {
            let is_own = namespace(&pid, kind) != namespace(&parent, kind);
            is_own == own.contains(name)
        })
}

fn every_thread(process: &Process, field: &str, value: &str) -> bool {
    let tasks = fs::read_dir(format!("/proc/{}/task", process.pid)).expect("threads");
    let mut statuses = tasks.filter_map(|task| {
        // A thread may have ended meanwhile.
        fs::read_to_string(task.ok()?.path().join("status")).ok()
    });
    statuses.all(|status| line(&status, field) == value)
}
