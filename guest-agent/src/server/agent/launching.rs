//! Creating containers, starting their programs, executing further ones in them.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;

use kiln_protocol::{CreateContainer, ExecProcess, FailurePhase, Joined, Network, Stdio};

use super::{Agent, FIRST_CGROUP, FIRST_CHANNEL, FIRST_MEMORY};
use crate::cgroup::{Cgroup, Notices};
use crate::console;
use crate::container::Plan;
use crate::container::channel::Command;
use crate::container::launch::{self, Launched, Others};
use crate::failure::{During, Failure};
use crate::process::ProcessPlan;
use crate::server::container::Container;
use crate::server::process::{Process, ProcessName, State};
use crate::server::streams::Endpoint;
use crate::server::supplies;
use kiln_protocol::StreamToken;

impl Agent {
    pub(super) fn create(&mut self, create: &CreateContainer) -> io::Result<()> {
        let name = ProcessName::first(&create.container);
        console::say(format_args!("{name}: setting up"));
        if self.containers.contains_key(&create.container) {
            let why = format!("container {:?} exists already", create.container);
            return self.send(&name.failed(Failure::config(why)));
        }
        match self.launch(create) {
            Ok(endpoints) => self.attend(name, endpoints),
            Err(failure) => self.refuse(name, &create.stdio, failure),
        }
    }

    pub(super) fn exec(&mut self, exec: &ExecProcess) -> io::Result<()> {
        let name = ProcessName::exec(&exec.container, exec.exec);
        let container = self.containers.get_mut(&exec.container);
        if container.is_some_and(|container| !container.exec_ids.insert(exec.exec)) {
            let why = format!("exec {} has been used before", exec.exec.0);
            return self.send(&name.failed(Failure::config(why)));
        }
        match self.join_container(exec) {
            Ok(endpoints) => self.attend(name, endpoints),
            Err(failure) => self.refuse(name, &exec.stdio, failure),
        }
    }

    pub(super) fn start(&mut self, container: &str, network: Option<&Network>) -> io::Result<()> {
        let name = ProcessName::first(container);
        let environment = self.environment.clone();
        let refused = match self.living(container) {
            Some(container) if container.first.state == State::Created => {
                supplies::refresh(&environment, &container.plan);
                match container.connect(network) {
                    Ok(()) => execute(&mut container.first),
                    Err(failure) => self.give_up(&name, failure),
                }
                return Ok(());
            }
            Some(_) => "is not waiting to be started",
            None => "does not exist",
        };
        let why = format!("container {container:?} {refused}");
        self.send(&name.failed(Failure::new(FailurePhase::Exec, why)))
    }

    fn launch(
        &mut self,
        create: &CreateContainer,
    ) -> Result<Vec<(StreamToken, Endpoint)>, Failure> {
        let plan = Plan::new(create, self.environment.cpus)?;
        let others = self.others(plan.namespaces.joined.as_ref())?;
        let unique = self.next_unique();
        let (supplies, devices) = supplies::gather(&self.environment, &plan, unique)?;
        let user = plan.namespaces.user.as_ref();
        let (ends, endpoints) = supplies::pipes(&create.stdio, &plan.process.identity, user)?;
        let cgroup = self
            .hierarchy
            .create()
            .during(FailurePhase::Cgroups, || "create the container's cgroup")?;
        let events = self.watch_cgroup(&cgroup, unique);
        let (events, memory_events) =
            events.during(FailurePhase::Cgroups, || "watch the container's cgroup")?;
        let launched = launch::launch(&plan, supplies, others, ends, &cgroup)?;
        let first = new_process(launched, unique, plan.process.clone(), &create.stdio);
        let container = Container {
            first,
            ended: None,
            execs: BTreeMap::new(),
            exec_ids: HashSet::new(),
            plan,
            cgroup,
            events,
            memory_events,
            oom_kills: 0,
            pausing: Vec::new(),
            _devices: devices,
        };
        self.containers.insert(create.container.clone(), container);
        Ok(endpoints)
    }

    /// The processes whose namespaces a container is to join.
    fn others(&mut self, joined: Option<&Joined>) -> Result<Others, Failure> {
        let Some(joined) = joined else { return Ok(Others::default()) };
        let processes = joined.processes.as_ref();
        Ok(Others {
            sandbox: Some(self.first_process(&joined.container)?),
            processes: processes.map(|container| self.first_process(container)).transpose()?,
        })
    }

    /// A pidfd of a container's first process.
    fn first_process(&mut self, container: &str) -> Result<OwnedFd, Failure> {
        let phase = FailurePhase::Namespaces;
        let refuse = |why| Failure::new(phase, format!("container {container:?} {why}"));
        let first = match self.living(container) {
            Some(container) if container.first.state != State::Creating => &container.first,
            Some(_) => return Err(refuse("is not set up yet")),
            None => return Err(refuse("does not run: its namespaces are gone")),
        };
        launch::open_process(first.pid).during(phase, || "the first process")
    }

    fn watch_cgroup(&self, cgroup: &Cgroup, unique: u64) -> io::Result<(Notices, Option<Notices>)> {
        let events = cgroup.events()?;
        self.poller.watch_changes(&events, FIRST_CGROUP + unique)?;
        let memory = match cgroup.memory_events() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            opened => Some(opened?),
        };
        if let Some(memory) = &memory {
            self.poller.watch_changes(memory, FIRST_MEMORY + unique)?;
        }
        Ok((events, memory))
    }

    fn join_container(
        &mut self,
        exec: &ExecProcess,
    ) -> Result<Vec<(StreamToken, Endpoint)>, Failure> {
        let unique = self.next_unique();
        let refuse = |why: &str| {
            let why = format!("container {:?} {why}", exec.container);
            Failure { phase: FailurePhase::Exec, message: why, exit_code: NOT_RUNNING }
        };
        let container = self
            .living(&exec.container)
            .ok_or_else(|| refuse("does not run: it has ended, or never was"))?;
        if container.first.state == State::Creating || container.first.failure.is_some() {
            return Err(refuse("is not set up yet"));
        }
        let process =
            serde_json::from_str(exec.process.get()).during(FailurePhase::Config, || "process")?;
        let personality = container.plan.process.personality;
        let plan = ProcessPlan::from_spec(&process, &exec.stdio, personality)?;
        let user = container.plan.namespaces.user.as_ref();
        let (ends, endpoints) = supplies::pipes(&exec.stdio, &plan.identity, user)?;
        let Container { plan: of_container, first, cgroup, .. } = container;
        let launched = launch::join(of_container, first.pid, &plan, ends, cgroup)?;
        let process = new_process(launched, unique, plan, &exec.stdio);
        container.execs.insert(exec.exec, process);
        Ok(endpoints)
    }

    /// From here on the process is heard and its streams are carried.
    fn attend(
        &mut self,
        name: ProcessName,
        endpoints: Vec<(StreamToken, Endpoint)>,
    ) -> io::Result<()> {
        let Some(process) = self.process_mut(&name) else {
            return Ok(());
        };
        let token = process.channel_token;
        if let Some(channel) = &process.channel {
            let socket = channel.socket().try_clone()?;
            self.poller.watch(&socket, token)?;
        }
        for (token, endpoint) in endpoints {
            self.offer(token, &name, endpoint)?;
        }
        Ok(())
    }

    fn refuse(&mut self, name: ProcessName, stdio: &Stdio, failure: Failure) -> io::Result<()> {
        self.streams.cancel(&supplies::tokens(stdio));
        console::say(format_args!("{name}: {failure}"));
        self.send(&name.failed(failure))
    }

    fn next_unique(&mut self) -> u64 {
        self.launched += 1;
        self.launched
    }
}

/// runc's status for an exec in a container that doesn't run.
const NOT_RUNNING: u8 = 255;

/// Has a process that waits for it execute its program. If it is gone, its end is reported as any
/// other.
pub(super) fn execute(process: &mut Process) {
    process.state = State::Starting;
    if let Some(channel) = &process.channel {
        let _ = channel.command(Command::Execute);
    }
}

fn new_process(launched: Launched, unique: u64, plan: ProcessPlan, stdio: &Stdio) -> Process {
    Process {
        pid: launched.pid,
        reaped: false,
        state: State::Creating,
        failure: None,
        channel: Some(launched.channel),
        channel_token: FIRST_CHANNEL + unique,
        plan,
        terminal: None,
        tokens: supplies::tokens(stdio),
    }
}
