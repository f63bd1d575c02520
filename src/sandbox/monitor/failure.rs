//! Why a container didn't run to its own end.
//!
//! What is said of it names the component and the cause, the phase in which it came about, and what
//! can be done; lines of whatever failed follow.

use std::borrow::Cow;

use anyhow::anyhow;
use kiln_protocol::FailurePhase;
use kiln_vmm::config::GuestEnd;

use crate::mend;
use crate::sandbox::phases::Phase;
use crate::sandbox::tail;

/// What can be done about what is not known better.
const MORE: &str =
    "`kiln doctor` checks this host, and the log of `kiln --debug --log FILE` has more";

/// Why a container didn't run to its own end, and the status to exit with.
#[derive(Debug)]
pub struct Failure {
    /// The status that the command exits with.
    pub exit_code: u8,
    /// The component and the cause, on one line.
    pub error: anyhow::Error,
    /// What else is known, line by line.
    details: Vec<String>,
    /// What can be done; without it that is looked for in what is known.
    mend: Option<Cow<'static, str>>,
    source: Source,
}

/// Where a failure came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Source {
    /// On the host.
    Host,
    /// In the guest or in what serves it: its console may say more.
    Guest,
    /// In the container's set-up, which the agent tells of in words that name it.
    Container(FailurePhase),
    /// The caller's own doing, or its program's.
    Caller,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(error, Source::Host)
    }
}

impl Failure {
    fn new(error: anyhow::Error, source: Source) -> Self {
        Self { exit_code: 1, error, details: Vec::new(), mend: None, source }
    }

    /// One that the guest's console may explain.
    pub fn of_guest(error: anyhow::Error) -> Self {
        Self::new(error, Source::Guest)
    }

    /// The command has ended for which the container runs.
    pub fn orphaned() -> Self {
        Self::new(anyhow!("the command that started the sandbox has ended"), Source::Caller)
    }

    /// One that the agent has told of, in its own words. That a program isn't found or can't be
    /// executed is its caller's business, who knows the words.
    pub fn told(message: String, exit_code: u8, phase: FailurePhase) -> Self {
        let is_program = matches!(exit_code, 126 | 127);
        let source = if is_program { Source::Caller } else { Source::Container(phase) };
        Self { exit_code, ..Self::new(anyhow!(message), source) }
    }

    /// A signal that came before there was a process to pass it on to.
    pub fn interrupted(signal: i32) -> Self {
        let name = nix::sys::signal::Signal::try_from(signal).map_or("a signal", |s| s.as_str());
        let exit_code = u8::try_from(signal).unwrap_or(0).saturating_add(128);
        let error = anyhow!("interrupted by {name} before the container had started");
        Self { exit_code, ..Self::new(error, Source::Caller) }
    }

    /// A limit that the step has exceeded, in words that have the mend.
    pub fn exceeded(message: String, exit_code: u8) -> Self {
        Self { exit_code, ..Self::new(anyhow!(message), Source::Caller) }
    }

    /// A guest that has ended without having been told to.
    pub fn unasked_end(how: &GuestEnd) -> Self {
        const OF_KERNEL: &str =
            "check with `kiln --version` that the guest kernel is kiln's own, and `kiln doctor`";
        let failure = |how: &str, mend| {
            Self::of_guest(anyhow!("the guest has ended by itself: {how}")).with_mend(mend)
        };
        match how {
            GuestEnd::Shutdown => failure(
                "it switched itself off",
                "give it more memory (--memory) if its console speaks of that; the log of `kiln \
                 --debug --log FILE` has more of its console",
            ),
            GuestEnd::Reset => failure(
                "it reset itself",
                "a guest's kernel does so when it panics: give it more memory (--memory) if its \
                 console speaks of that; the log of `kiln --debug --log FILE` has more of its console",
            ),
            GuestEnd::TripleFault => failure("triple fault", OF_KERNEL),
            GuestEnd::Broken { reason, registers } => {
                let registers = tail::printable_lines(&registers.join("\n"));
                let registers = registers.lines().map(str::to_owned).collect();
                failure(&tail::printable(reason), OF_KERNEL).with_details(registers)
            }
        }
    }

    /// Has the command exit with this.
    pub fn with_exit_code(self, exit_code: u8) -> Self {
        Self { exit_code, ..self }
    }

    /// Says what can be done.
    pub fn with_mend(self, mend: impl Into<Cow<'static, str>>) -> Self {
        Self { mend: Some(mend.into()), ..self }
    }

    /// Says what else is known.
    pub fn with_details(self, details: Vec<String>) -> Self {
        Self { details, ..self }
    }

    /// Whether the guest's console may say more.
    pub fn shows_console(&self) -> bool {
        self.source == Source::Guest
    }

    /// What is said of it, but for the console.
    pub fn message(&self, phase: Phase) -> String {
        let text = format!("{:#}", self.error);
        let mut message = match self.source {
            Source::Caller => text,
            Source::Container(part) => {
                let phase = phase.name();
                let part = part_name(part);
                mend::extend_first_line(&text, &format!("; last phase reached: {phase}, {part}"))
            }
            Source::Host | Source::Guest => {
                let known = || mend::of(&text).or_else(|| mend::of(&self.details.join("\n")));
                let mend = self.mend.as_deref().or_else(known).unwrap_or(MORE);
                let phase = phase.name();
                mend::extend_first_line(&text, &format!("; last phase reached: {phase}; {mend}"))
            }
        };
        for line in &self.details {
            message.push_str("\n  ");
            message.push_str(line);
        }
        message
    }
}

fn part_name(phase: FailurePhase) -> &'static str {
    match phase {
        FailurePhase::Config => "configuration",
        FailurePhase::Namespaces => "namespaces",
        FailurePhase::Network => "network",
        FailurePhase::Mounts => "mounts",
        FailurePhase::Cgroups => "cgroup",
        FailurePhase::Process => "process",
        FailurePhase::Stdio => "standard streams",
        FailurePhase::Hooks => "hooks",
        FailurePhase::Exec => "execution",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn host_and_guest_failures_name_the_phase_and_the_mend() {
        let error = anyhow!(io::Error::from_raw_os_error(libc::EMFILE)).context("vsock broker");
        let message = Failure::from(error).message(Phase::HostSetup);
        let expected = "vsock broker: Too many open files (os error 24); last phase reached: host \
                        set-up; raise the caller's limit on open files (ulimit -n)";
        assert_eq!(message, expected);
        let said = "qemu-system-x86_64: cannot set up guest memory: Cannot allocate memory";
        let failure = Failure::of_guest(anyhow!("QEMU exited with status 1"))
            .with_details(vec![said.to_owned()]);
        let message = failure.message(Phase::Boot);
        let expected =
            "QEMU exited with status 1; last phase reached: boot; the host has no memory";
        assert!(message.starts_with(expected), "{message}");
        assert!(message.ends_with(&format!("\n  {said}")), "{message}");
        assert!(failure.shows_console());
    }

    #[test]
    fn every_unasked_end_of_a_guest_has_a_mend() {
        let broken =
            GuestEnd::Broken { reason: "KVM gave up".into(), registers: vec!["rip".into()] };
        for how in [GuestEnd::Shutdown, GuestEnd::Reset, GuestEnd::TripleFault, broken] {
            let message = Failure::unasked_end(&how).message(Phase::Run);
            let first = message.lines().next().unwrap_or_default();
            assert!(first.contains("; last phase reached: step; "), "{message}");
            assert!(first.contains("`kiln "), "{message}");
        }
    }

    #[test]
    fn words_that_callers_know_stay_as_they_are() {
        let words = "exec: \"x\": executable file not found in $PATH";
        let told = |exit_code, phase| Failure::told(words.to_owned(), exit_code, phase);
        assert_eq!(told(127, FailurePhase::Exec).message(Phase::Create), words);
        assert_eq!(
            told(1, FailurePhase::Mounts).message(Phase::Create),
            format!("{words}; last phase reached: container set-up, mounts")
        );
        assert_eq!(Failure::interrupted(15).exit_code, 143);
    }
}
