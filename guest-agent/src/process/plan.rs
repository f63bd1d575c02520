//! What a process of a container is to be, read from `process`.

use std::path::PathBuf;

use kiln_protocol::{Stdio, WindowSize};
use oci_spec::runtime::Process;

use super::capabilities::CapabilitySets;
use super::rlimits::{self, Rlimit};
use super::scheduling::{self, SchedulerAttributes};
use super::user::Identity;
use crate::failure::Failure;

/// Everything about the process but its tree and where its stdio goes.
#[derive(Debug, Clone)]
pub struct ProcessPlan {
    /// The program and its arguments, at least one.
    pub args: Vec<String>,
    /// The environment.
    pub env: Vec<String>,
    /// The working directory, absolute.
    pub cwd: PathBuf,
    /// User, groups, umask.
    pub identity: Identity,
    /// Capabilities.
    pub capabilities: CapabilitySets,
    /// No privileges may be gained by executing a program.
    pub no_new_privileges: bool,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// The OOM killer's preference, -1000 to 1000.
    pub oom_score_adj: i32,
    /// Processor scheduling.
    pub scheduler: Option<SchedulerAttributes>,
    /// The argument of ioprio_set(2).
    pub io_priority: Option<libc::c_int>,
    /// The argument of personality(2).
    pub personality: Option<libc::c_ulong>,
    /// Size of the terminal, if there is to be one.
    pub terminal: Option<WindowSize>,
}

impl ProcessPlan {
    /// Reads `process`. `personality` is the container's, as for personality(2).
    ///
    /// # Errors
    /// A field that can't be honoured, by name.
    pub fn from_spec(
        process: &Process,
        stdio: &Stdio,
        personality: Option<libc::c_ulong>,
    ) -> Result<Self, Failure> {
        refuse(process)?;
        let terminal = match *stdio {
            Stdio::Terminal { size, .. } => Some(size),
            Stdio::Pipes { .. } => None,
        };
        if process.terminal().unwrap_or(false) != terminal.is_some() {
            return Err(Failure::config("process.terminal: does not agree with the stdio given"));
        }
        let args = process.args().clone().unwrap_or_default();
        if args.is_empty() {
            return Err(Failure::config("process.args: empty, there is nothing to run"));
        }
        let env = process.env().clone().unwrap_or_default();
        for (field, texts) in [("args", &args), ("env", &env)] {
            if texts.iter().any(|text| text.contains('\0')) {
                return Err(Failure::config(format!("process.{field}: contains a null byte")));
            }
        }
        let cwd = process.cwd().clone();
        if !cwd.is_absolute() {
            return Err(Failure::config(format!("process.cwd: {cwd:?} is not absolute")));
        }
        let oom_score_adj = process.oom_score_adj().unwrap_or(0);
        if !(-1000..=1000).contains(&oom_score_adj) {
            return Err(Failure::config(format!("process.oomScoreAdj: {oom_score_adj}")));
        }
        Ok(Self {
            args,
            env,
            cwd,
            identity: Identity::from_spec(process.user()),
            capabilities: CapabilitySets::from_spec(process.capabilities().as_ref())?,
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
            rlimits: rlimits::from_spec(process.rlimits().as_deref().unwrap_or(&[]))?,
            oom_score_adj,
            scheduler: process.scheduler().as_ref().map(scheduling::scheduler).transpose()?,
            io_priority: process.io_priority().as_ref().map(scheduling::io_priority).transpose()?,
            personality,
            terminal,
        })
    }
}

fn refuse(process: &Process) -> Result<(), Failure> {
    let named = |value: &Option<String>| value.as_ref().is_some_and(|value| !value.is_empty());
    let confined =
        process.apparmor_profile().as_ref().is_some_and(|p| !p.is_empty() && p != "unconfined");
    let refused = [
        (confined, "apparmorProfile", "the guest's kernel has no AppArmor"),
        (named(process.selinux_label()), "selinuxLabel", "the guest's kernel has no SELinux"),
        (named(process.command_line()), "commandLine", "is for Windows"),
        (named(process.user().username()), "user.username", "is for Windows"),
        (process.exec_cpu_affinity().is_some(), "execCPUAffinity", "is not supported"),
    ];
    match refused.iter().find(|(refused, ..)| *refused) {
        Some((_, field, why)) => Err(Failure::config(format!("process.{field}: {why}"))),
        None => Ok(()),
    }
}
