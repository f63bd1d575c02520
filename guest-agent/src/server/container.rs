//! A container that has been launched, until its end.

use std::collections::{BTreeMap, HashSet};

use kiln_protocol::{ExecId, ExitStatus, FailurePhase, Network};

use super::process::Process;
use crate::cgroup::{Cgroup, Notices};
use crate::container::Plan;
use crate::failure::Failure;
use crate::network;
use crate::rootfs::devices::DeviceStore;

/// A container. Dropping it kills what is left of it.
#[derive(Debug)]
pub struct Container {
    /// Its first process. The kernel ends the others with it, and has it reaped last, unless it lives in
    /// the PID namespace of another container's.
    pub first: Process,
    /// How that has ended, while others of the container are still to go.
    pub ended: Option<ExitStatus>,
    /// Its execs.
    pub execs: BTreeMap<ExecId, Process>,
    /// Every exec there has been.
    pub exec_ids: HashSet<ExecId>,
    /// What it was made from.
    pub plan: Plan,
    /// Its cgroup.
    pub cgroup: Cgroup,
    /// What happens to the cgroup.
    pub events: Notices,
    /// What happens to its memory, where the kernel controls it.
    pub memory_events: Option<Notices>,
    /// Processes killed for want of memory that have been reported.
    pub oom_kills: u64,
    /// Requests to be answered when it stands still.
    pub pausing: Vec<u32>,
    /// Its device nodes: they go when it goes.
    pub _devices: DeviceStore,
}

impl Container {
    /// Gives the container its network, if there is one for it.
    ///
    /// # Errors
    /// See [`network::set_up`]; or the container shares the agent's namespace.
    pub fn connect(&self, network: Option<&Network>) -> Result<(), Failure> {
        match network {
            None => Ok(()),
            Some(network) if self.plan.namespaces.has_new_network() => {
                network::set_up(network, self.first.pid)
            }
            Some(_) => {
                let why =
                    "linux.namespaces: no network namespace of its own to put interfaces into";
                Err(Failure::new(FailurePhase::Network, why))
            }
        }
    }

    /// Nothing of it is left but its first process, if that is.
    pub fn is_over(&self) -> bool {
        self.execs.is_empty() && self.events.read("populated") == 0
    }

    /// An exec, or the first process.
    pub fn process(&self, exec: Option<ExecId>) -> Option<&Process> {
        exec.map_or(Some(&self.first), |exec| self.execs.get(&exec))
    }

    /// An exec, or the first process.
    pub fn process_mut(&mut self, exec: Option<ExecId>) -> Option<&mut Process> {
        match exec {
            None => Some(&mut self.first),
            Some(exec) => self.execs.get_mut(&exec),
        }
    }

    /// Which of its processes it is that has a property.
    pub fn find(&self, wanted: impl Fn(&Process) -> bool) -> Option<Option<ExecId>> {
        if wanted(&self.first) {
            return Some(None);
        }
        self.execs.iter().find(|(_, process)| wanted(process)).map(|(exec, _)| Some(*exec))
    }
}
