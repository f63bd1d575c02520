//! Why a container didn't run to its own end.

use anyhow::anyhow;
use kiln_vmm::config::GuestEnd;

/// Why a container didn't run to its own end, and the status to exit with.
#[derive(Debug)]
pub struct Failure {
    /// The status that the command exits with.
    pub exit_code: u8,
    /// What went wrong.
    pub error: anyhow::Error,
    /// The guest's console may say more.
    pub show_console: bool,
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { exit_code: 1, error, show_console: false }
    }
}

impl Failure {
    /// One that the guest's console may explain.
    pub fn of_guest(error: anyhow::Error) -> Self {
        Self { exit_code: 1, error, show_console: true }
    }

    /// One that the agent has told of, in its own words.
    pub fn told(message: String, exit_code: u8) -> Self {
        Self { exit_code, error: anyhow!(message), show_console: false }
    }

    /// A signal that came before there was a process to pass it on to.
    pub fn interrupted(signal: i32) -> Self {
        let name = nix::sys::signal::Signal::try_from(signal).map_or("a signal", |s| s.as_str());
        let exit_code = u8::try_from(signal).unwrap_or(0).saturating_add(128);
        let error = anyhow!("interrupted by {name} before the container had started");
        Self { exit_code, error, show_console: false }
    }

    /// A guest that has ended without having been told to.
    pub fn unasked_end(how: &GuestEnd) -> Self {
        let how = match how {
            GuestEnd::Shutdown => "it switched itself off".to_owned(),
            GuestEnd::Reset => "it reset itself".to_owned(),
            GuestEnd::TripleFault => "triple fault".to_owned(),
            GuestEnd::Broken { reason, registers } => {
                format!("{reason}\n  {}", registers.join("\n  "))
            }
        };
        Self::of_guest(anyhow!("the guest has ended by itself: {how}"))
    }
}
