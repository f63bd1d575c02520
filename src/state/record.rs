//! `state.json`: what is known of a container.

use std::collections::HashMap;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::bundle::HostHooks;
use crate::cgroup::Cgroup;
use crate::network::Namespace;
use crate::procfs::Stat;
use crate::sandbox::inspection::Inspection;

/// What `state.json` says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Version of the OCI runtime specification, as in the bundle.
    pub oci_version: String,
    /// The container's id.
    pub id: String,
    /// How far it was when this was written.
    pub status: Status,
    /// The process that stands for the container.
    pub monitor: Monitor,
    /// The bundle's directory.
    pub bundle: PathBuf,
    /// The root file system's directory.
    pub rootfs: PathBuf,
    /// When the sandbox was made, as in RFC 3339.
    pub created: String,
    /// The name of the user who made it; the number if there is no name.
    pub owner: String,
    /// The bundle's annotations, and kiln's own.
    pub annotations: HashMap<String, String>,
    /// The engine in use.
    pub engine: String,
    /// It stays until it is deleted. Others go with the command that runs them.
    pub kept: bool,
    /// The host's cgroup that its processes are in.
    pub cgroup: Cgroup,
    /// The network namespace whose interfaces it has, or may have.
    #[serde(default)]
    pub network: Option<Namespace>,
    /// The bundle's hooks of the host.
    pub hooks: HostHooks,
    /// How it ended, once it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<Box<End>>,
}

/// What is left of a container that has ended, besides its files.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct End {
    /// The status that its process on the host exited with.
    pub exit_code: u8,
    /// What went wrong, if kiln couldn't run it to its own end.
    pub error: Option<String>,
    /// What its monitor knew last.
    pub inspection: Inspection,
}

/// How far a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// Its sandbox is being made.
    Creating,
    /// It waits to be started.
    Created,
    /// Its program runs.
    Running,
    /// Its processes are frozen.
    Paused,
    /// Its program has ended.
    Stopped,
}

impl Status {
    /// Its name in the runtime specification.
    pub fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

/// A process, told from a later one that has the same id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Monitor {
    /// Its process id.
    pub pid: i32,
    /// When it was started, in clock ticks since the host's boot: field 22 of proc_pid_stat(5), as the
    /// host's own time namespace has it.
    pub started: i64,
}

impl Monitor {
    /// The calling process.
    ///
    /// # Errors
    /// There is no `/proc`.
    pub fn this() -> io::Result<Self> {
        let pid = nix::unistd::getpid().as_raw();
        let stat = Stat::read(pid)?.ok_or(io::ErrorKind::NotFound)?;
        Ok(Self { pid, started: started(&stat)? })
    }

    /// A descriptor of the process, if it runs: no successor of the same id can take its place.
    pub fn open(self) -> Option<OwnedFd> {
        // SAFETY: plain numbers.
        let number = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        let number = RawFd::try_from(number).ok().filter(|number| *number >= 0)?;
        // SAFETY: the kernel has just made the descriptor for this process.
        let pidfd = unsafe { OwnedFd::from_raw_fd(number) };
        // Only now is it sure that the descriptor is the process's own.
        self.is_alive().then_some(pidfd)
    }

    /// Whether it runs. One that has ended and was not waited for yet doesn't.
    pub fn is_alive(self) -> bool {
        matches!(Stat::read(self.pid), Ok(Some(stat)) if self.is(&stat))
    }

    /// Whether this is what `/proc` says of it, under its process id, and it runs.
    pub fn is(self, stat: &Stat) -> bool {
        let is_it = |started: i64| started.abs_diff(self.started) <= ROUNDING;
        stat.is_alive() && started(stat).is_ok_and(is_it)
    }
}

/// Two readers in different time namespaces may differ by so many ticks, which are hundredths of a
/// second: their offsets are no multiples of a tick. No process id comes round that soon.
const ROUNDING: u64 = 1;

/// When a process was started, as the host's own time namespace has it.
fn started(stat: &Stat) -> io::Result<i64> {
    let ticks = i64::try_from(stat.started).map_err(io::Error::other)?;
    Ok(ticks.saturating_sub(shift()?))
}

/// By how many ticks the start times that this process reads are later than the host's own: it may be
/// in another time namespace (time_namespaces(7)) than whoever wrote a record.
fn shift() -> io::Result<i64> {
    let text = match std::fs::read_to_string("/proc/self/timens_offsets") {
        Ok(text) => text,
        // A kernel without time namespaces.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
        Err(error) => return Err(error),
    };
    shift_of(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, "unreadable /proc/self/timens_offsets")
    })
}

/// The shift that `/proc/self/timens_offsets` tells of: a line for each clock, in seconds and
/// nanoseconds.
fn shift_of(offsets: &str) -> Option<i64> {
    const SECOND: i64 = 1_000_000_000;
    /// `USER_HZ` is 100 on every architecture that kiln runs on.
    const TICK: i64 = SECOND / 100;

    let line = offsets.lines().find(|line| line.starts_with("boottime"))?;
    let mut numbers = line.split_ascii_whitespace().skip(1).map(str::parse::<i64>);
    let (seconds, nanoseconds) = (numbers.next()?.ok()?, numbers.next()?.ok()?);
    Some(seconds.checked_mul(SECOND)?.checked_add(nanoseconds)?.div_euclid(TICK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offsets_of_time_namespaces_are_read() {
        let of = |seconds, nanoseconds| {
            shift_of(&format!("monotonic  7  0\nboottime   {seconds}  {nanoseconds}\n"))
        };
        assert_eq!(of(0, 0), Some(0));
        assert_eq!(of(86_400, 20_000_000), Some(8_640_002));
        assert_eq!(of(-1, 0), Some(-100));
        assert_eq!(shift_of("monotonic 0 0\n"), None);
    }

    #[test]
    fn process_lives_until_its_end_even_unreaped() {
        let mut child =
            std::process::Command::new("/bin/sleep").arg("1000").spawn().expect("child");
        let pid = i32::try_from(child.id()).expect("pid");
        let started = Stat::read(pid).expect("proc").expect("there").started;
        let started = i64::try_from(started).expect("ticks");
        let monitor = Monitor { pid, started };
        assert!(monitor.is_alive());
        assert!(!Monitor { started: started + 2, ..monitor }.is_alive());
        child.kill().expect("killed");
        while Stat::read(pid).expect("proc").expect("there").is_alive() {
            std::thread::yield_now();
        }
        assert!(!monitor.is_alive());
        child.wait().expect("reaped");
        assert!(!monitor.is_alive());
    }
}
