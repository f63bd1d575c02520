//! What this host can do for kiln, check by check, each with its mend.
//!
//! * [`engines`]: KVM and the self-test on it, QEMU.
//! * [`guest`]: the guest's kernel and agent.
//! * [`host`]: what the processes of a sandbox ask of the host.
//! * [`jail`]: what their jails ask of its kernel.
//!
//! Nothing is changed on the host, but that the engine's verdict is remembered. A check that fails
//! takes something away that it names. One engine of two is enough; what no container can do without
//! is in [`Report::blockers`], and where that has something in it kiln is of no use
//! ([`Report::usable`]).

mod engines;
mod guest;
mod host;
mod jail;

use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::engine::Memory;
use crate::settings::Settings;

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// kiln runs, but something is missing.
    Warn,
    /// What depends on this doesn't work.
    Fail,
}

impl fmt::Display for Status {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.pad(match self {
            Self::Ok => "ok",
            Self::Warn => "warn",
            Self::Fail => "FAIL",
        })
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked, in a word or two.
    pub name: &'static str,
    /// How it went.
    pub status: Status,
    /// What was found and what that means.
    pub explanation: String,
    /// What can be done about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mend: Option<String>,
}

impl Check {
    fn ok(name: &'static str, explanation: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, explanation: explanation.into(), mend: None }
    }

    fn warn(name: &'static str, explanation: impl Into<String>, mend: impl Into<String>) -> Self {
        let (explanation, mend) = (explanation.into(), Some(mend.into()));
        Self { name, status: Status::Warn, explanation, mend }
    }

    fn fail(name: &'static str, explanation: impl Into<String>, mend: impl Into<String>) -> Self {
        Self { status: Status::Fail, ..Self::warn(name, explanation, mend) }
    }
}

/// All checks.
#[derive(Debug, Serialize)]
pub struct Report {
    /// Containers can be run here: nothing is in the way.
    pub usable: bool,
    /// The engine that `auto` takes, if any.
    pub engine: Option<&'static str>,
    /// Names of the failed checks without which nothing runs.
    pub blockers: Vec<&'static str>,
    /// The checks.
    pub checks: Vec<Check>,
}

/// Does all checks.
pub fn examine(settings: &Settings, lib_dir: Option<&Path>, memory: Memory) -> Report {
    let mut checks = Vec::new();
    let kvm = engines::kvm(&mut checks, memory);
    let emulated = engines::emulated(&mut checks, &settings.qemu, kvm);
    let engines = checks.len();
    checks.extend(guest::checks(lib_dir));
    checks.extend(host::checks());
    checks.extend(jail::checks());
    let engine = match (kvm, emulated) {
        (true, _) => Some("kvm"),
        (false, true) => Some("emulated"),
        (false, false) => None,
    };
    // The engines' own failures matter only together.
    let vital = &checks[if engine.is_some() { engines } else { 0 }..];
    let failed = vital.iter().filter(|check| check.status == Status::Fail);
    let blockers: Vec<_> = failed.map(|check| check.name).collect();
    Report { usable: blockers.is_empty() && engine.is_some(), engine, blockers, checks }
}
