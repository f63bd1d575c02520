//! What the kernel says of a process, for a list of a container's processes (proc_pid_stat(5),
//! proc_pid_status(5), proc_pid_cmdline(5)). Names and arguments are the processes' own to choose.

use std::fs::{self, File};
use std::io::Read;

use kiln_protocol::{GuestProcess, MAX_COMMAND, MAX_NAME};

use crate::failure::clip;

/// Describes a process of the agent's PID namespace. `None` for one that is gone.
pub fn describe(pid: libc::pid_t) -> Option<GuestProcess> {
    let read = |file: &str| fs::read(format!("/proc/{pid}/{file}")).ok();
    let stat = Stat::parse(&read("stat")?)?;
    let (uid, container_pid) = identity(&String::from_utf8_lossy(&read("status")?))?;
    let mut command = Vec::new();
    let file = File::open(format!("/proc/{pid}/cmdline")).ok()?;
    // A process without memory has no arguments.
    let _ = file.take(MAX_COMMAND as u64).read_to_end(&mut command);
    Some(GuestProcess {
        pid: u32::try_from(pid).ok()?,
        container_pid,
        parent: stat.parent,
        uid,
        cpu_time_ms: milliseconds(stat.cpu_ticks),
        start_time: milliseconds(stat.start_ticks),
        command: arguments(&command),
        name: stat.name,
    })
}

/// The figures of `/proc/<pid>/stat` that a list has.
#[derive(Debug, PartialEq, Eq)]
struct Stat {
    name: String,
    parent: u32,
    cpu_ticks: u64,
    start_ticks: u64,
}

impl Stat {
    fn parse(stat: &[u8]) -> Option<Self> {
        let begin = stat.iter().position(|byte| *byte == b'(')?;
        // A name may have parentheses of its own.
        let end = stat.iter().rposition(|byte| *byte == b')')?;
        let name = String::from_utf8_lossy(stat.get(begin + 1..end)?);
        let fields = String::from_utf8_lossy(&stat[end + 1..]);
        let fields: Vec<&str> = fields.split_whitespace().collect();
        // Fields are counted from 1 in the manual; the third is the first after the name.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            name: clip(&name, MAX_NAME).to_owned(),
            parent: u32::try_from(field(4)?).ok()?,
            cpu_ticks: field(14)?.checked_add(field(15)?)?,
            start_ticks: field(22)?,
        })
    }
}

/// The effective user id, and the process id in the innermost namespace, of a `/proc/<pid>/status`.
fn identity(status: &str) -> Option<(u32, u32)> {
    let fields = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().map(|field| field.parse::<u32>().ok()).collect::<Option<Vec<_>>>()
    };
    Some((*fields("Uid:")?.get(1)?, *fields("NSpid:")?.last()?))
}

fn arguments(command: &[u8]) -> Vec<String> {
    let command = command.strip_suffix(&[0]).unwrap_or(command);
    if command.is_empty() {
        return Vec::new();
    }
    let mut room = MAX_COMMAND;
    let argument = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let text = clip(&text, room).to_owned();
        room -= text.len();
        text
    };
    command.split(|byte| *byte == 0).take(MAX_COMMAND).map(argument).collect()
}

fn milliseconds(ticks: u64) -> u64 {
    // SAFETY: asks for a number.
    let second = u64::try_from(unsafe { libc::sysconf(libc::_SC_CLK_TCK) }).unwrap_or(100).max(1);
    ticks.saturating_mul(1000) / second
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn this_process_is_described_as_it_is() {
        let pid = std::process::id();
        let own = describe(pid as libc::pid_t).expect("alive");
        assert_eq!((own.pid, own.container_pid), (pid, pid));
        assert_eq!(own.parent, std::os::unix::process::parent_id());
        assert_eq!(own.uid, nix::unistd::geteuid().as_raw());
        let program = std::env::args().next().expect("a name");
        assert!(own.command[0].starts_with(clip(&program, MAX_COMMAND)));
        assert!(own.start_time > 0);
        assert_eq!(describe(libc::pid_t::MAX), None);
    }

    #[test]
    fn name_may_look_like_the_fields_behind_it() {
        let rest = "S 7 1 1 0 -1 4194560 1 2 3 4 100 20 0 0 20 0 1 0 555 1 2";
        let stat = Stat::parse(format!("12 (a) R 1 (b) {rest}").as_bytes()).expect("parses");
        assert_eq!((stat.name.as_str(), stat.parent), ("a) R 1 (b", 7));
        assert_eq!((stat.cpu_ticks, stat.start_ticks), (120, 555));
    }

    proptest! {
        #[test]
        fn arguments_stay_within_their_bounds(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let arguments = arguments(&bytes);
            prop_assert!(arguments.len() <= MAX_COMMAND);
            prop_assert!(arguments.iter().map(String::len).sum::<usize>() <= MAX_COMMAND);
        }

        #[test]
        fn strange_files_are_no_processes_and_no_panics(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            if let Some(stat) = Stat::parse(&bytes) {
                prop_assert!(stat.name.len() <= MAX_NAME);
            }
            identity(&String::from_utf8_lossy(&bytes));
        }
    }
}
