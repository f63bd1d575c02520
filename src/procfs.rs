//! What `/proc` says of a process (proc(5)).
//!
//! A process may end at any moment, and its id be another's: who must be sure compares when it was
//! started. Names are the processes' own choice.

use std::io::{self, ErrorKind};

/// What `/proc/PID/stat` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stat {
    /// Its name, at most 15 characters long.
    pub name: String,
    /// Its state's letter.
    pub state: u8,
    /// The process that it belongs to.
    pub parent: i32,
    /// Processor time in user mode, in clock ticks.
    pub user: u64,
    /// Processor time in the kernel, in clock ticks.
    pub system: u64,
    /// When it was started, in clock ticks since the host's boot.
    pub started: u64,
}

impl Stat {
    /// Reads it; `None` if there is no such process.
    ///
    /// # Errors
    /// There is no `/proc`, or it has another form.
    pub fn read(pid: i32) -> io::Result<Option<Self>> {
        match std::fs::read(format!("/proc/{pid}/stat")) {
            Ok(text) => match Self::parse(&text) {
                Some(stat) => Ok(Some(stat)),
                None => Err(io::Error::new(ErrorKind::InvalidData, "unreadable /proc/PID/stat")),
            },
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether it runs. One that has ended and was not waited for yet doesn't.
    pub fn is_alive(&self) -> bool {
        !matches!(self.state, b'Z' | b'X')
    }

    fn parse(text: &[u8]) -> Option<Self> {
        // The name may hold anything, spaces and parentheses too.
        let name_begins = text.iter().position(|&byte| byte == b'(')? + 1;
        let name_ends = text.iter().rposition(|&byte| byte == b')')?;
        let name = String::from_utf8_lossy(text.get(name_begins..name_ends)?).into_owned();
        let fields = String::from_utf8_lossy(&text[name_ends + 1..]).into_owned();
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        // The manual's third field is the first behind the name.
        let number = |field: usize| fields.get(field - 3)?.parse().ok();
        Some(Self {
            name,
            state: fields.first()?.bytes().next()?,
            parent: fields.get(1)?.parse().ok()?,
            user: number(14)?,
            system: number(15)?,
            started: number(22)?,
        })
    }
}

/// The ids of the processes that there are.
///
/// # Errors
/// There is no `/proc`.
pub fn ids() -> io::Result<impl Iterator<Item = i32>> {
    let entries = std::fs::read_dir("/proc")?;
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok()))
}

/// The processes that there are, each with what its `stat` says. Those that end meanwhile are left
/// out.
///
/// # Errors
/// There is no `/proc`.
pub fn all() -> io::Result<Vec<(i32, Stat)>> {
    let mut found = Vec::new();
    for pid in ids()? {
        if let Some(stat) = Stat::read(pid)? {
            found.push((pid, stat));
        }
    }
    Ok(found)
}

/// The memory of a process in bytes, what it shares with others divided by their number: `Pss` of
/// `/proc/PID/smaps_rollup`. `None`: it has ended, or may not be looked at.
pub fn proportional_memory(pid: i32) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim_end().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// How many clock ticks are in a second.
pub fn ticks_per_second() -> u64 {
    // SAFETY: no pointers.
    let ticks = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    u64::try_from(ticks).ok().filter(|&ticks| ticks > 0).unwrap_or(100)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_may_hold_anything() {
        let mut text = b"7 (a) S (b) R 3".to_vec();
        for field in 5..=52 {
            text.extend(format!(" {field}").into_bytes());
        }
        let stat = Stat::parse(&text).expect("parsed");
        assert_eq!((stat.name.as_str(), stat.state, stat.parent), ("a) S (b", b'R', 3));
        assert_eq!((stat.user, stat.system, stat.started), (14, 15, 22));
    }

    #[test]
    fn this_process_is_found_with_its_memory() {
        let own = std::process::id().cast_signed();
        let stat = Stat::read(own).expect("proc").expect("there");
        assert!(stat.is_alive());
        assert_eq!(stat.parent, nix::unistd::getppid().as_raw());
        assert!(all().expect("proc").iter().any(|(pid, _)| *pid == own));
        assert!(proportional_memory(own).is_some_and(|bytes| bytes > 0));
        assert!(Stat::read(i32::MAX).expect("proc").is_none());
    }

    proptest! {
        #[test]
        fn no_text_is_too_strange(text in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Stat::parse(&text);
        }

        #[test]
        fn nor_one_that_is_nearly_right(text in "[0-9]{1,3} ?[()]{0,3} ?[SRZ]?( [0-9-]{1,3}){0,60}") {
            let _ = Stat::parse(text.as_bytes());
        }
    }
}
