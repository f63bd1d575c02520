//! Runs the self-test guests, each in a `kiln vmm` of its own: the jailed process that runs any
//! guest, so that what is tested is what will be used. A KVM that hangs hangs that process, which
//! is killed at the deadline.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::Stdio;
use std::time::{Duration, Instant};

use kiln_selftest_guests::{Guest, RING_SPEED, RING_TRANSITIONS};
use kiln_vmm::config::{
    BootConfig, ConsoleConfig, ConsoleKind, Entry, GuestEnd, MachineConfig, VmmConfig, VmmEvent,
};
use nix::sys::socket::MsgFlags;

use super::findings::{self, Findings};
use crate::process::{Launch, memory_file};
use crate::readiness::readable_by;
use crate::sandbox::packet;

/// For one guest, which takes milliseconds, or a second where ring 0 is emulated.
const DEADLINE: Duration = Duration::from_secs(20);
/// More than any guest says.
const LONGEST_TEXT: usize = 64 << 10;
const MEMORY_MIB: u64 = 16;

/// Why the self-test could not be done. None of these is a verdict: the next attempt may succeed.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// A resource of the host.
    #[error("{what}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// No user for the process.
    #[error("the machine's user: {0}")]
    Identity(String),
    /// The machine's process could not go on.
    #[error("{0}")]
    Machine(String),
    /// It did not end in time.
    #[error(
        "guest {guest} did not end within {} seconds and said {said:?}", DEADLINE.as_secs()
    )]
    Deadline {
        /// The guest.
        guest: &'static str,
        /// Its lines until then.
        said: String,
    },
    /// The guest said what it never says.
    #[error("guest {guest}: {problem}")]
    Guest {
        /// The guest.
        guest: &'static str,
        /// What is wrong.
        problem: String,
    },
}

fn host(what: &'static str) -> impl Fn(io::Error) -> ProbeError {
    move |source| ProbeError::Host { what, source }
}

/// Runs the self-test on an opened `/dev/kvm`.
///
/// # Errors
/// See [`ProbeError`].
pub fn run(kvm: &File) -> Result<Findings, ProbeError> {
    let clock = Clock::start();
    let (text, end) = run_guest(kvm, RING_TRANSITIONS)?;
    let failed_transition = match end {
        GuestEnd::Shutdown => named(RING_TRANSITIONS, findings::transitions(&text))?,
        end => Some(format!("the guest ended early: {}", describe(&end))),
    };
    let (text, end) = run_guest(kvm, RING_SPEED)?;
    let hz = clock.ticks_per_second();
    let ring0_per_second = match end {
        GuestEnd::Shutdown => named(RING_SPEED, findings::ring0_per_second(&text, hz))?,
        end => named(RING_SPEED, Err(describe(&end)))?,
    };
    Ok(Findings { failed_transition, ring0_per_second })
}

fn named<T>(guest: Guest, result: Result<T, String>) -> Result<T, ProbeError> {
    result.map_err(|problem| ProbeError::Guest { guest: guest.name, problem })
}

fn describe(end: &GuestEnd) -> String {
    match end {
        GuestEnd::Shutdown => "it switched off".to_owned(),
        GuestEnd::Reset => "it was reset".to_owned(),
        GuestEnd::TripleFault => "triple fault".to_owned(),
        GuestEnd::Broken { reason, .. } => reason.clone(),
    }
}

/// Runs a guest; gives what it said and how it ended.
fn run_guest(kvm: &File, guest: Guest) -> Result<(String, GuestEnd), ProbeError> {
    let (control, their_control) = packet::pair().map_err(host("socket pair"))?;
    let (console, their_console) = io::pipe().map_err(host("pipe"))?;
    let mut launch = prepare(kvm, guest, their_control, their_console.into())?;
    let mut errors = memory_file("kiln-self-test-errors").map_err(host("memory file"))?;
    let their_errors = errors.try_clone().map_err(host("memory file"))?;
    launch.stdio(Stdio::null(), Stdio::null(), their_errors.into()).alone();
    let mut process = launch.spawn().map_err(host("can't start the machine's process"))?;

    let deadline = Instant::now() + DEADLINE;
    let mut console = File::from(OwnedFd::from(console));
    let text = read_until(&mut console, deadline).map_err(host("console"))?;
    let ended = text.ended && readable_by(process.pidfd(), Some(deadline)).map_err(host("wait"))?;
    let said = String::from_utf8_lossy(&text.bytes).into_owned();
    if !ended {
        process.kill();
        return Err(ProbeError::Deadline { guest: guest.name, said });
    }
    let status = process.wait().map_err(host("wait"))?;
    match end_of(&control)? {
        Some(end) => Ok((said, end)),
        None => {
            let how = crate::process::describe(status);
            let why = last_line(&mut errors).map_err(host("memory file"))?;
            Err(ProbeError::Machine(format!("the machine's process {how}{why}")))
        }
    }
}

/// What a process said last on its standard error, if anything.
fn last_line(errors: &mut File) -> io::Result<String> {
    errors.rewind()?;
    let mut bytes = Vec::new();
    errors.take(LONGEST_TEXT as u64).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let last = text.lines().rfind(|line| !line.trim().is_empty());
    Ok(last.map(|line| format!(": {line}")).unwrap_or_default())
}

fn prepare(
    kvm: &File,
    guest: Guest,
    control: OwnedFd,
    console: OwnedFd,
) -> Result<Launch, ProbeError> {
    let mut image = memory_file("kiln-self-test").map_err(host("memory file"))?;
    image.write_all(guest.image).and_then(|()| image.rewind()).map_err(host("memory file"))?;
    let kvm = kvm.try_clone().map_err(host("/dev/kvm"))?;
    let jail = kiln_vmm::jail::identity::allocate()
        .map_err(|error| ProbeError::Identity(error.to_string()))?;
    let mut launch = Launch::verb("vmm", &[]);
    let machine = MachineConfig {
        id: format!("self-test-{}", guest.name),
        kvm: launch.give(kvm),
        memory_mib: MEMORY_MIB,
        cpus: 1,
        boot: BootConfig {
            kernel: launch.give(image),
            initrd: None,
            cmdline: String::new(),
            entry: Entry::Linux64,
        },
        console: ConsoleConfig {
            kind: ConsoleKind::Serial,
            input: None,
            output: Some(launch.give(console)),
        },
        disks: Vec::new(),
        nets: Vec::new(),
        shares: Vec::new(),
        vsock: None,
        jail,
    };
    let config = VmmConfig { machine, control: launch.give(control) };
    launch.configure(&config).map_err(host("configuration"))?;
    Ok(launch)
}

/// What the process said of the guest's end before it ended itself, if it did.
fn end_of(control: &OwnedFd) -> Result<Option<GuestEnd>, ProbeError> {
    loop {
        let event = packet::receive(control.as_fd(), MsgFlags::MSG_DONTWAIT);
        match event.map_err(host("control socket"))? {
            Some(VmmEvent::Running | VmmEvent::SpaceUsedUp) => {}
            Some(VmmEvent::Ended { how }) => return Ok(Some(how)),
            Some(VmmEvent::Failed { message }) => return Err(ProbeError::Machine(message)),
            None => return Ok(None),
        }
    }
}

struct Text {
    bytes: Vec<u8>,
    /// All was read, until the other end closed.
    ended: bool,
}

fn read_until(from: &mut File, deadline: Instant) -> io::Result<Text> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    while bytes.len() < LONGEST_TEXT && readable_by(from.as_fd(), Some(deadline))? {
        match from.read(&mut chunk)? {
            0 => return Ok(Text { bytes, ended: true }),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
    Ok(Text { bytes, ended: false })
}

/// Finds out how fast the time stamp counter counts, over the time that the guests take anyway.
struct Clock {
    ticks: u64,
    time: Instant,
}

impl Clock {
    fn start() -> Self {
        Self { ticks: ticks(), time: Instant::now() }
    }

    fn ticks_per_second(&self) -> u64 {
        let ticks = u128::from(ticks().wrapping_sub(self.ticks));
        let rate = ticks * 1_000_000_000 / self.time.elapsed().as_nanos().max(1);
        u64::try_from(rate).unwrap_or(u64::MAX)
    }
}

fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has the counter; Linux leaves it open to user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_writer_runs_into_the_deadline() {
        let (reader, mut writer) = io::pipe().expect("pipe");
        writer.write_all(b"ok a\n").expect("written");
        let mut reader = File::from(OwnedFd::from(reader));
        let soon = Instant::now() + Duration::from_millis(20);
        let text = read_until(&mut reader, soon).expect("reads");
        assert!(!text.ended);
        assert_eq!(text.bytes, b"ok a\n");
        drop(writer);
        let text = read_until(&mut reader, Instant::now() + DEADLINE).expect("reads");
        assert!(text.ended && text.bytes.is_empty());
    }

    #[test]
    fn a_flood_of_text_is_cut_off() {
        let zero = File::open("/dev/zero").expect("device");
        let mut zero = zero;
        let text = read_until(&mut zero, Instant::now() + DEADLINE).expect("reads");
        assert!(!text.ended && text.bytes.len() < 2 * LONGEST_TEXT);
    }
}
