//! A container's configuration, read and checked as a whole.

use kiln_protocol::{CreateContainer, Stdio};
use oci_spec::runtime::{Linux, Spec};

use super::namespaces::Namespaces;
use crate::cgroup::Limits;
use crate::failure::{During, Failure};
use crate::process::ProcessPlan;
use crate::process::sysctl::{self, Sysctls};
use crate::rootfs::RootfsPlan;
use crate::seccomp::{self, Filter, Profile};
use kiln_protocol::FailurePhase;

/// Everything that a container is to be.
#[derive(Debug)]
pub struct Plan {
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Files.
    pub rootfs: RootfsPlan,
    /// The first process.
    pub process: ProcessPlan,
    /// Control group.
    pub limits: Limits,
    /// System calls.
    pub seccomp: Option<Filter>,
    /// Kernel parameters.
    pub sysctls: Sysctls,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
}

impl Plan {
    /// Reads a configuration. `cpus` is the guest's number of processors.
    ///
    /// # Errors
    /// A configuration that is malformed or asks for what can't be done, by field.
    pub fn new(create: &CreateContainer, cpus: usize) -> Result<Self, Failure> {
        let spec: Spec = serde_json::from_str(create.config.get())
            .during(FailurePhase::Config, || "config.json")?;
        refuse(&spec)?;
        let terminal = match create.stdio {
            Stdio::Terminal { size, .. } => Some(size),
            Stdio::Pipes { .. } => None,
        };
        let process = ProcessPlan::from_spec(&spec)?;
        let wanted = spec.process().as_ref().and_then(|process| process.terminal());
        if wanted.unwrap_or(false) != terminal.is_some() {
            return Err(Failure::config("process.terminal: does not agree with the stdio given"));
        }
        let linux = spec.linux().as_ref();
        let namespaces = Namespaces::from_spec(linux)?;
        let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
        let domainname = spec.domainname().clone().filter(|name| !name.is_empty());
        if (hostname.is_some() || domainname.is_some()) && !namespaces.uts {
            return Err(Failure::config("hostname, domainname: need a UTS namespace"));
        }
        let profile = linux.and_then(|linux| linux.seccomp().as_ref());
        let profile = profile.map(Profile::from_spec).transpose()?;
        let sysctls = linux.and_then(|linux| linux.sysctl().as_ref());
        Ok(Self {
            rootfs: RootfsPlan::from_spec(&spec, &create.binds, &process.cwd, terminal)?,
            limits: Limits::from_spec(linux.and_then(|linux| linux.resources().as_ref()), cpus)?,
            seccomp: profile.as_ref().map(seccomp::compile).transpose()?,
            sysctls: sysctl::from_spec(sysctls.into_iter().flatten())?,
            namespaces,
            process,
            hostname,
            domainname,
        })
    }
}

fn refuse(spec: &Spec) -> Result<(), Failure> {
    if let Some(hooks) = spec.hooks() {
        let inside = [
            ("createContainer", hooks.create_container()),
            ("startContainer", hooks.start_container()),
        ];
        let given = |list: &&Option<Vec<_>>| list.as_ref().is_some_and(|list| !list.is_empty());
        if let Some((name, _)) = inside.iter().find(|(_, list)| given(list)) {
            return Err(Failure::config(format!(
                "hooks.{name}: hooks inside the container are not supported"
            )));
        }
    }
    spec.linux().as_ref().map_or(Ok(()), refuse_in_linux)
}

fn refuse_in_linux(linux: &Linux) -> Result<(), Failure> {
    let label = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
    let devices = linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty());
    let refused = [
        (linux.intel_rdt().is_some(), "intelRdt", "the guest's processors have no such control"),
        (linux.memory_policy().is_some(), "memoryPolicy", "the guest has one memory node"),
        (devices, "netDevices", "the host's interfaces are not in the guest"),
        (label, "mountLabel", "the guest's kernel has no SELinux"),
    ];
    match refused.iter().find(|(refused, ..)| *refused) {
        Some((_, field, why)) => Err(Failure::config(format!("linux.{field}: {why}"))),
        None => Ok(()),
    }
}
