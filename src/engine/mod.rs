//! The choice of the engine: what executes a guest's code on this host.
//!
//! That `/dev/kvm` is there says little: what stands behind it may be unable to run a Linux guest.
//! So two [self-test guests](kiln_selftest_guests) run on it, in `kiln vmm` as any guest does, with
//! a deadline. What they find is judged once for each boot of the host and version of kiln and then
//! remembered.
//!
//! * [`device`]: opens `/dev/kvm`, or says how it can be made to open.
//! * [`probe`]: runs a self-test guest in a process of its own.
//! * [`findings`]: what such a guest said, parsed.
//! * [`verdict`]: what that means for Linux.
//! * [`cache`]: remembers the verdict.
//!
//! `auto` takes kvm where it runs Linux and otherwise the emulated engine, with a notice: QEMU's
//! software CPU is no security boundary. `kvm` never falls back.

mod cache;
pub mod device;
mod findings;
mod probe;
pub mod verdict;

use std::io::Write;
use std::path::{Path, PathBuf};

use self::device::DeviceError;
use self::probe::ProbeError;
use self::verdict::Verdict;
use crate::sandbox::Engine;
use crate::sandbox::machine::find_program;
use crate::settings::EngineChoice;

/// What runs the guest, and what the user should be told about that.
#[derive(Debug, PartialEq, Eq)]
pub struct Choice {
    /// The engine.
    pub engine: Engine,
    /// One line for standard error and the sandbox's annotations.
    pub notice: Option<String>,
}

impl Choice {
    /// Tells the user what there is to tell.
    pub fn announce(&self) {
        if let Some(notice) = &self.notice {
            tracing::warn!("{notice}");
            // Standard error that is closed has no reader to miss it.
            let _ = writeln!(std::io::stderr(), "kiln: {notice}");
        }
    }
}

/// Why no engine can be used.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// kvm was asked for and can't be had.
    #[error(
        "the kvm engine can't be used here: {0}; `kiln doctor` shows each check, and \
         --engine emulated runs without KVM, slowly and without a security boundary"
    )]
    Kvm(KvmProblem),
    /// Neither engine can be used.
    #[error(
        "no engine can be used here: kvm can't because {kvm}; emulated can't because there is no \
         QEMU at {}: install qemu-system-x86 or name its executable with `qemu` in the \
         configuration file", .qemu.display()
    )]
    None {
        /// Why not kvm.
        kvm: KvmProblem,
        /// Where QEMU was looked for.
        qemu: PathBuf,
    },
}

/// Why the kvm engine can't be used.
#[derive(Debug, thiserror::Error)]
pub enum KvmProblem {
    /// The device can't be opened.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The self-test could not be done.
    #[error("its self-test failed: {}", chain(.0))]
    Probe(#[from] ProbeError),
    /// The self-test says that Linux can't run.
    #[error("this KVM cannot run a Linux guest: {0}")]
    CannotRunLinux(String),
}

fn chain(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(Some(error), |error| error.source());
    sources.map(ToString::to_string).collect::<Vec<_>>().join(": ")
}

/// Chooses the engine; `qemu` is QEMU's executable as configured.
///
/// # Errors
/// What was asked for can't be had, or, asked for any, there is none.
pub fn choose(requested: EngineChoice, qemu: &Path) -> Result<Choice, EngineError> {
    match requested {
        EngineChoice::Emulated => Ok(Choice { engine: Engine::Emulated, notice: None }),
        EngineChoice::Kvm => match usable_kvm(Memory::Trusted) {
            Ok(_) => Ok(Choice { engine: Engine::Kvm, notice: None }),
            Err(problem) => Err(EngineError::Kvm(problem)),
        },
        EngineChoice::Auto => automatic(usable_kvm(Memory::Trusted).map(|_| ()), qemu),
    }
}

fn automatic(kvm: Result<(), KvmProblem>, qemu: &Path) -> Result<Choice, EngineError> {
    let Err(problem) = kvm else {
        return Ok(Choice { engine: Engine::Kvm, notice: None });
    };
    if find_program(qemu).is_err() {
        return Err(EngineError::None { kvm: problem, qemu: qemu.to_owned() });
    }
    let notice = format!(
        "engine: emulated (QEMU's software CPU: for development and tests, not a security \
         boundary), because {problem}"
    );
    Ok(Choice { engine: Engine::Emulated, notice: Some(notice) })
}

/// Whether a remembered verdict will do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Memory {
    /// It will.
    Trusted,
    /// The self-test is to be done again.
    Refreshed,
}

/// Finds out whether KVM runs Linux here; gives how many instructions a second its ring 0 executes.
///
/// # Errors
/// See [`KvmProblem`].
pub fn usable_kvm(memory: Memory) -> Result<u64, KvmProblem> {
    // First, always: permission belongs to the user, not to the boot of the host.
    let kvm = device::open()?;
    let cache = cache::Cache::of_this_boot();
    let remembered = match memory {
        Memory::Trusted => cache.as_ref().and_then(cache::Cache::load),
        Memory::Refreshed => None,
    };
    let verdict = match remembered {
        Some(verdict) => verdict,
        None => {
            let verdict = verdict::judge(&probe::run(&kvm)?);
            if let Some(cache) = &cache {
                cache.store(&verdict);
            }
            verdict
        }
    };
    match verdict {
        Verdict::RunsLinux { ring0_per_second } => Ok(ring0_per_second),
        Verdict::CannotRunLinux { reason } => Err(KvmProblem::CannotRunLinux(reason)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem() -> KvmProblem {
        KvmProblem::CannotRunLinux("SYSCALL is lost".to_owned())
    }

    #[test]
    fn kvm_is_taken_without_a_word() {
        let choice = automatic(Ok(()), Path::new("/nonexistent/qemu")).expect("kvm");
        assert_eq!(choice, Choice { engine: Engine::Kvm, notice: None });
    }

    #[test]
    fn fallback_is_announced_in_one_line_with_the_reason() {
        // Any program stands for QEMU: it isn't run.
        let choice = automatic(Err(problem()), Path::new("sh")).expect("emulated");
        assert_eq!(choice.engine, Engine::Emulated);
        let notice = choice.notice.expect("a notice");
        assert!(notice.contains("SYSCALL is lost") && notice.contains("not a security boundary"));
        assert_eq!(notice.lines().count(), 1);
    }

    #[test]
    fn without_either_both_reasons_are_given() {
        let error = automatic(Err(problem()), Path::new("/nonexistent/qemu")).expect_err("none");
        let text = error.to_string();
        assert!(text.contains("SYSCALL is lost") && text.contains("/nonexistent/qemu"), "{text}");
    }

    #[test]
    fn what_is_asked_for_by_name_is_not_tested() {
        let choice = choose(EngineChoice::Emulated, Path::new("/nonexistent/qemu")).expect("it");
        assert_eq!(choice, Choice { engine: Engine::Emulated, notice: None });
    }
}
