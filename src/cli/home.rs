//! Where a container that is about to be made is set up: in a machine of its own, or, for a container
//! of a pod, in that of the pod's sandbox.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, anyhow, bail};
use kiln_protocol::Joined;
use kiln_vmm::config::{FileLimits, RateConfig};

use super::Global;
use super::launch::Options;
use crate::artefacts::Artefacts;
use crate::bundle::pod::{self, Part};
use crate::bundle::{Bundle, Host, NamespaceKind, Size};
use crate::engine;
use crate::limits;
use crate::process::Launch;
use crate::sandbox::{Engine, Guest, GuestConfig, PodConfig, control};
use crate::settings::{EngineChoice, Settings};
use crate::state::{self, Container, Status};

/// Where a container is set up.
pub enum Home {
    /// In a machine of its own.
    Own(Own),
    /// In that of its pod's sandbox.
    Pod(Box<Sandbox>),
}

/// A machine of a container's own.
pub struct Own {
    engine: Engine,
    size: Size,
    files: FileLimits,
    takes_interfaces: bool,
    network: RateConfig,
    kernel: File,
    agent: File,
}

/// The sandbox of a pod.
pub struct Sandbox {
    container: Container,
    engine: Engine,
    joined: Joined,
    /// A connection to its monitor.
    monitor: OwnedFd,
}

impl Home {
    /// Decides by the bundle's annotations. A machine is as flags, annotations, the bundle and the
    /// settings want it.
    ///
    /// # Errors
    /// The sandbox isn't there, or has ended, or isn't what the bundle says it is; the size is out of
    /// range; the guest's kernel or its agent isn't there.
    pub fn find(
        global: &Global,
        options: &Options,
        limits: &limits::Limits,
        bundle: &Bundle,
        settings: &Settings,
    ) -> anyhow::Result<Self> {
        if let Some(Part::Container { sandbox, annotation }) = &bundle.pod {
            let found = Sandbox::find(global, bundle, sandbox);
            let sandbox = found.with_context(|| format!("annotations[{annotation:?}]"))?;
            sandbox.check(options)?;
            return Ok(Self::Pod(Box::new(sandbox)));
        }
        let choice = match options.engine {
            Some(engine) => engine,
            None => bundle.setting("io.kiln.engine")?.unwrap_or(settings.engine),
        };
        let size = Size::decide(limits.machine, &bundle.spec, Host::detect())?;
        let choice = engine::choose(choice, &settings.qemu)?;
        choice.announce();
        let folder = global.lib_dir.as_deref().or(settings.lib_dir.as_deref());
        let artefacts = Artefacts::find(folder)?;
        let (kernel, agent) = (artefacts.open_kernel()?, artefacts.open_agent()?);
        Ok(Self::Own(Own {
            engine: choice.engine,
            size,
            files: limits.files,
            takes_interfaces: !pod::leaves_network(&bundle.spec),
            network: limits.network,
            kernel,
            agent,
        }))
    }

    /// The engine that executes its code.
    pub fn engine(&self) -> Engine {
        match self {
            Self::Own(own) => own.engine,
            Self::Pod(sandbox) => sandbox.engine,
        }
    }

    /// Hands over what the monitor needs of it.
    pub fn hand_over(self, settings: &Settings, launch: &mut Launch) -> Guest {
        match self {
            Self::Own(own) => Guest::Own(GuestConfig {
                engine: own.engine,
                cpus: own.size.cpus,
                memory_mib: own.size.memory_mib,
                kernel: launch.give(own.kernel),
                agent: launch.give(own.agent),
                files: own.files,
                takes_interfaces: own.takes_interfaces,
                network: own.network,
                kernel_args: settings.kernel_args.clone(),
                qemu: settings.qemu.clone(),
            }),
            Self::Pod(sandbox) => Guest::Pod(PodConfig {
                sandbox: sandbox.container.record.id,
                monitor: launch.give(sandbox.monitor),
                joined: sandbox.joined,
                // Its monitor knows.
                memory_mib: 0,
            }),
        }
    }
}

impl Sandbox {
    fn find(global: &Global, bundle: &Bundle, id: &str) -> anyhow::Result<Self> {
        const MEND: &str = "have every container of the pod made by kiln with the same --root, its \
             sandbox first (with CRI-O, drop_infra_ctr = false), or give each a machine of its own \
             by the annotation io.kiln.machine=container";

        let container =
            state::find(&global.root, id).map_err(|error| anyhow!("{error}: {MEND}"))?;
        if container.status() == Status::Stopped {
            bail!("the pod's sandbox {id} has stopped");
        }
        let engine = [Engine::Kvm, Engine::Emulated]
            .into_iter()
            .find(|engine| engine.name() == container.record.engine)
            .with_context(|| format!("the pod's sandbox {id} has no engine that kiln knows"))?;
        let mut joined = joined(bundle, &container)?;
        if let Some(pid) = pod::processes_of(&bundle.spec) {
            joined.processes = Some(container_of(global, pid)?);
        }
        let monitor = control::reach(&container)
            .with_context(|| format!("the monitor of the pod's sandbox {id}"))?;
        Ok(Self { container, engine, joined, monitor })
    }

    /// Refuses what could only have been decided with the sandbox.
    fn check(&self, options: &Options) -> anyhow::Result<()> {
        let id = &self.container.record.id;
        let other = match options.engine {
            Some(EngineChoice::Kvm) => self.engine != Engine::Kvm,
            Some(EngineChoice::Emulated) => self.engine != Engine::Emulated,
            Some(EngineChoice::Auto) | None => false,
        };
        // Annotations are the pod's: callers give each of its containers all of them.
        let given = options.limits;
        let refused = [
            ("engine", other),
            ("cpus", options.cpus.is_some()),
            ("memory", options.memory.is_some()),
            // The processes that keep these serve all containers of the pod.
            ("disk-limit", given.disk_limit.is_some()),
            ("disk-bandwidth", given.disk_bandwidth.is_some()),
            ("iops", given.iops.is_some()),
            ("network-rate", given.network_rate.is_some()),
            ("network-burst", given.network_burst.is_some()),
        ];
        match refused.iter().find(|(_, refused)| *refused) {
            Some((flag, _)) => bail!(
                "--{flag}: the container is set up in the machine of the pod's sandbox {id}, which \
                 runs: leave it out"
            ),
            None => Ok(()),
        }
    }
}

/// The container that a process stands for, whose PID namespace is to be joined. Whether it is of this
/// pod, the agent finds out: no other is in its guest.
fn container_of(global: &Global, pid: i32) -> anyhow::Result<String> {
    let found = state::all(&global.root)?.into_iter().find(|container| {
        container.record.monitor.pid == pid && container.status() != Status::Stopped
    });
    let found = found.with_context(|| {
        format!(
            "linux.namespaces: no container of kiln's runs whose process is {pid}: name the pod's \
             sandbox or another of its containers"
        )
    })?;
    Ok(found.record.id)
}

/// Which namespaces the bundle has in common with the sandbox: those whose paths name one that the
/// sandbox's monitor is in.
fn joined(bundle: &Bundle, sandbox: &Container) -> anyhow::Result<Joined> {
    let (id, pid) = (&sandbox.record.id, sandbox.record.monitor.pid);
    let container = id.clone();
    let mut joined = Joined { container, network: false, ipc: false, uts: false, processes: None };
    for namespace in &bundle.namespaces {
        let Some(existing) = &namespace.existing else { continue };
        let (kind, file) = match namespace.kind {
            NamespaceKind::Network => (&mut joined.network, "net"),
            NamespaceKind::Ipc => (&mut joined.ipc, "ipc"),
            NamespaceKind::Uts => (&mut joined.uts, "uts"),
            // What is seen of cgroups is the guest's.
            NamespaceKind::Cgroup => continue,
        };
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        let of_sandbox = fs::metadata(format!("/proc/{pid}/ns/{file}")).map(identity);
        let named = fs::metadata(format!("/proc/self/fd/{}", existing.as_raw_fd())).map(identity);
        *kind = matches!((of_sandbox, named), (Ok(a), Ok(b)) if a == b);
        if !*kind {
            bail!(
                "linux.namespaces: the {} namespace is not that of the pod's sandbox {id}: a guest \
                 can join no other",
                namespace.kind.name()
            );
        }
    }
    Ok(joined)
}
