//! A sandbox: the monitor that stands for it, and what the command that started it says to it.
//!
//! # Shape
//! * [`monitor`]: a container's life from host set-up to teardown, each phase with its deadline.
//! * [`machine`]: starts the processes that make the machine, for either engine.
//! * [`events`]: everything that can happen, from all sources, in one channel.
//! * [`conversation`]: what the agent may say next; the guest is hostile.
//! * [`deadline`]: limits on time that hold still when everything does.
//! * [`clock`]: the host's wall clock, when it jumps.
//! * [`agent_stream`]: the connection to the agent, which its maker can't block.
//! * [`broker`]: vsock connections, which the device process hands over as descriptors.
//! * [`stdio`]: copies between vsock streams and the caller's own standard streams.
//! * [`budget`]: how much a container may write there, by all who copy it.
//! * [`tail`]: the last lines of what a process or the guest's console wrote, bounded.
//! * [`transcript`]: all that they write, in the log, bounded likewise.
//! * [`phases`]: where the time went.
//! * [`trace`]: the same, for programs that draw it.
//! * [`client`]: the side of the command that starts a sandbox.
//! * [`control`]: the side of later commands, and how the monitor hears them.
//! * [`proxy`]: the process that stands for a further program in the container.
//! * [`host_processes`]: a sandbox's processes on the host, found without its monitor.
//! * [`inspection`]: what the monitor tells later commands of the sandbox by itself.
//! * [`pod`]: the containers of a pod, each with a monitor, in one machine.
//! * [`document`]: what is too long for a message between those.
//!
//! # Promises
//! Nothing outlives the monitor: the kernel kills its children when it ends, and they end when their
//! control socket hangs up. The monitor of a foreground `run` ends the sandbox when that command
//! ends, and the state directory is removed by whichever of the two is last. Any other monitor goes
//! on without the command that started it, serves later ones ([`control`]), and leaves the state
//! directory for `delete`.

mod agent_stream;
mod broker;
mod budget;
pub mod client;
mod clock;
pub mod control;
mod conversation;
mod deadline;
pub mod document;
mod events;
pub mod host_processes;
pub mod inspection;
pub mod machine;
mod monitor;
pub mod packet;
pub mod phases;
pub mod pidfd_socket;
pub mod pod;
mod proxy;
mod readable;
mod stdio;
pub mod tail;
pub mod trace;
mod transcript;

use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;

use kiln_protocol::{Joined, WindowSize};
use kiln_vmm::config::{FileLimits, InheritedFd, RateConfig};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::bundle::{Bind, NamespaceKind};
use crate::cgroup::{self, Machine};
use crate::limits::StepLimits;
use crate::state::Record;

pub use monitor::run;
pub use proxy::{ProxyConfig, run as run_proxy};

/// What executes the guest's code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Engine {
    /// `kiln vmm` on `/dev/kvm`.
    Kvm,
    /// QEMU's software CPU and `kiln devices`.
    Emulated,
}

impl Engine {
    /// Its name, as in flags and configuration files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Emulated => "emulated",
        }
    }
}

/// What the monitor is told.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MonitorConfig {
    /// The container.
    pub container: ContainerConfig,
    /// What is remembered of the container; the monitor fills in what only it knows.
    pub record: Record,
    /// What the command waits for.
    pub mode: Mode,
    /// The namespaces of the host to live in.
    pub namespaces: Vec<NamespaceConfig>,
    /// The host name in a new UTS namespace.
    pub hostname: Option<String>,
    /// How readily the host's OOM killer takes the sandbox's processes, -1000 to 1000; without it as
    /// the caller.
    pub oom_score_adj: Option<i32>,
    /// The cgroup of the host to live in.
    pub cgroup: cgroup::Wanted,
    /// Its limits.
    pub limits: cgroup::Limits,
    /// The machine.
    pub guest: Guest,
    /// How long things may take.
    pub deadlines: Deadlines,
    /// The state directory and the descriptor of its lock.
    pub state: (PathBuf, InheritedFd),
    /// A connected `SOCK_SEQPACKET` Unix socket to the command: [`FromCommand`] one way,
    /// [`FromMonitor`] the other.
    pub command: InheritedFd,
    /// Where to write the monitor's pid once the command has what it waits for; absolute.
    pub pid_file: Option<PathBuf>,
    /// Where to write how long each phase took.
    pub timings: Option<PathBuf>,
    /// A trace that the command has begun.
    pub trace: Option<InheritedFd>,
    /// Have the machine's processes log debugging lines, which the monitor passes on.
    pub debug: bool,
    /// When the command started, by `CLOCK_MONOTONIC`, in nanoseconds.
    pub started_ns: u64,
}

/// A namespace of the host that the monitor is to live in.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NamespaceConfig {
    /// Its type.
    pub kind: NamespaceKind,
    /// One that exists; without it the monitor makes a new one.
    pub existing: Option<InheritedFd>,
}

/// What the command that starts a sandbox waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// `create`: until the container waits to be started.
    Create,
    /// `run --detach`: until the container's program runs.
    Detached,
    /// `run`: until the sandbox has ended; it ends with the command.
    Attached,
}

/// The container that a monitor stands for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerConfig {
    /// Its id.
    pub id: String,
    /// The bundle's `config.json`.
    pub config: Box<RawValue>,
    /// The root file system's directory.
    pub rootfs: PathBuf,
    /// The container may not write to it.
    pub rootfs_read_only: bool,
    /// The bind mounts.
    pub binds: Vec<Bind>,
    /// The container's memory limit in bytes, if it has one.
    pub memory_limit: Option<u64>,
    /// The limits of it that the monitor keeps.
    pub step: StepLimits,
    /// The container's process has a terminal of this size; it is relayed to standard input and
    /// output.
    pub terminal: Option<WindowSize>,
}

impl ContainerConfig {
    /// Gives the container a host name, as its `config.json` does with `hostname`.
    ///
    /// # Errors
    /// `config.json` is no object.
    pub fn set_hostname(&mut self, name: &str) -> serde_json::Result<()> {
        let mut config: serde_json::Map<_, _> = serde_json::from_str(self.config.get())?;
        config.insert("hostname".into(), name.into());
        self.config = serde_json::value::to_raw_value(&config)?;
        Ok(())
    }
}

/// Where a container is set up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Guest {
    /// In a machine of its own.
    Own(GuestConfig),
    /// In that of its pod's sandbox.
    Pod(PodConfig),
}

impl Guest {
    /// It has a machine of its own.
    pub fn is_own(&self) -> bool {
        matches!(self, Self::Own(_))
    }

    /// The machine's memory in MiB.
    pub fn memory_mib(&self) -> u64 {
        match self {
            Self::Own(guest) => guest.memory_mib,
            Self::Pod(pod) => pod.memory_mib,
        }
    }

    /// What the host's limits are for, where the container's own memory limit is this, in bytes: the
    /// machine, or, in another's, a process that stands for what is accounted for there.
    pub fn on_host(&self, memory_limit: Option<u64>) -> Machine {
        match self {
            Self::Own(guest) => Machine { engine: guest.engine, memory_mib: guest.memory_mib },
            Self::Pod(_) => Machine {
                engine: Engine::Kvm,
                memory_mib: memory_limit.unwrap_or_default().div_ceil(1 << 20),
            },
        }
    }

    /// Whether the container has the interfaces of its network namespace. A pod's are its sandbox's.
    pub fn takes_interfaces(&self) -> bool {
        match self {
            Self::Own(guest) => guest.takes_interfaces,
            Self::Pod(_) => false,
        }
    }

    /// The id of the pod's sandbox, if that is another.
    pub fn sandbox(&self) -> &str {
        match self {
            Self::Own(_) => "",
            Self::Pod(pod) => &pod.sandbox,
        }
    }
}

/// The pod in whose machine a container is set up.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PodConfig {
    /// The sandbox's id.
    pub sandbox: String,
    /// A connection to the control socket of the sandbox's monitor.
    pub monitor: InheritedFd,
    /// The namespaces that the container has in common with the sandbox.
    pub joined: Joined,
    /// The machine's memory in MiB, once it is known.
    pub memory_mib: u64,
}

/// The machine that a container gets.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestConfig {
    /// What executes its code.
    pub engine: Engine,
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// The kernel.
    pub kernel: InheritedFd,
    /// The agent.
    pub agent: InheritedFd,
    /// What it may do with the files that it shares.
    pub files: FileLimits,
    /// It gets the interfaces of its network namespace.
    pub takes_interfaces: bool,
    /// What each of its network devices may pass, each way.
    pub network: RateConfig,
    /// Words appended to the kernel's command line.
    pub kernel_args: String,
    /// QEMU's executable.
    pub qemu: PathBuf,
}

/// How long phases may take, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deadlines {
    /// From the machine's start until the agent has called.
    pub agent: u64,
    /// For the agent to set the container up, and to start it, each.
    pub create: u64,
    /// For the guest to end once it has been told to.
    pub shutdown: u64,
}

/// What a command says to the monitor that it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromCommand {
    /// Send this signal to the container's process.
    Signal(i32),
    /// The terminal has this size now.
    Resize(WindowSize),
    /// What [`Occasion::Made`] calls for is done.
    Proceed,
    /// From a process that stands for an exec: more was written than the container may write.
    OutputExceeded,
}

/// When hooks of the host run, which the command does: it is in the caller's namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Occasion {
    /// The monitor stands in the container's namespaces, and waits for [`FromCommand::Proceed`].
    Made,
    /// The container's program runs.
    Started,
}

/// What a monitor says to the command that started it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromMonitor {
    /// Hooks are to be run. Not sent where there are none.
    At(Occasion),
    /// What the command waits for is reached; the sandbox goes on without it.
    Reached,
    /// The sandbox has ended.
    Ended(Outcome),
}

/// How a sandbox ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// The status that the command exits with.
    pub exit_code: u8,
    /// What went wrong, if kiln couldn't run the container to its own end.
    pub error: Option<String>,
    /// What the container's user should know although kiln did its part.
    pub notice: Option<String>,
}

impl Outcome {
    /// Tells the command that waits for it; if there is none any more, the log.
    fn report(self, command: Option<&OwnedFd>) {
        if let Some(notice) = &self.notice {
            tracing::warn!("{notice}");
        }
        if let Some(command) = command {
            // If it's gone there is nobody to tell.
            let _ = packet::send_message(command.as_fd(), &FromMonitor::Ended(self));
        } else if let Some(error) = self.error {
            tracing::error!("{error}");
        }
    }
}
