//! What `create` and `run` share: from a bundle and options to a sandbox with its monitor.

use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, anyhow, bail};
use kiln_protocol::WindowSize;
use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Process, Spec};

use super::Global;
use super::console::Console;
use super::home::Home;
use crate::bundle::{self, Bundle, Namespace};
use crate::cgroup;
use crate::hooks;
use crate::limits::{Flags, Given, Limits};
use crate::log::rfc3339;
use crate::privileges;
use crate::process::Launch;
use crate::sandbox::client::Client;
use crate::sandbox::pidfd_socket::PidfdSocket;
use crate::sandbox::trace::Trace;
use crate::sandbox::{
    ContainerConfig, Deadlines, Engine, Guest, Mode, MonitorConfig, NamespaceConfig, Occasion,
    Outcome, phases,
};
use crate::settings::{EngineChoice, Settings};
use crate::state::{Monitor, Record, StateDir, Status};

/// Options of every verb that makes a sandbox.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Write the process id that stands for the container to this file, last of all
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// Send the master of the container's terminal to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Send a descriptor of the process that stands for the container to this Unix socket
    #[arg(long, value_name = "SOCKET")]
    pidfd_socket: Option<PathBuf>,
    /// What executes the guest's code
    #[arg(long, value_enum)]
    pub engine: Option<EngineChoice>,
    /// The guest's CPUs, 1 to 32
    #[arg(long, value_name = "N")]
    pub cpus: Option<u8>,
    /// The guest's memory in MiB, the guest's own overhead included
    #[arg(long, value_name = "MIB")]
    pub memory: Option<u64>,
    #[command(flatten)]
    pub limits: Given,
    /// Write how long each phase took to this file, as JSON, once the sandbox has ended
    #[arg(long, value_name = "FILE")]
    timings: Option<PathBuf>,
    /// Write what happens and when to this file until the sandbox has ended, for Perfetto or Chrome
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
    /// Accepted for compatibility: the container pivots inside its guest
    #[arg(long)]
    no_pivot: bool,
    /// Accepted for compatibility: the guest has keyrings of its own
    #[arg(long)]
    no_new_keyring: bool,
    /// Refused unless 0: descriptors of the host mean nothing in a guest
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// The container's id
    id: String,
}

/// What becomes of the sandbox once the command has what it waits for.
#[derive(Debug, Clone, Copy)]
pub struct Purpose {
    /// What the command waits for.
    pub mode: Mode,
    /// The container stays until it is deleted, even if it fails once it has begun.
    pub keep: bool,
}

impl Purpose {
    /// Whether the container stays once the command has what it waits for.
    fn outlives_the_command(self) -> bool {
        self.keep || matches!(self.mode, Mode::Detached)
    }
}

/// Makes a sandbox and waits for what `purpose` says. `None`: it goes on by itself.
///
/// # Errors
/// Anything that is wrong with the options, the bundle or the host, or that happened until then.
pub fn launch(
    global: &Global,
    options: Options,
    purpose: Purpose,
) -> anyhow::Result<Option<Outcome>> {
    let mut wanted = Wanted::check(global, options, purpose)?;
    let id = &wanted.options.id;
    let state = wanted.trace.timed("state directory", || StateDir::create(&global.root, id))?;
    let record = describe(id, &wanted.bundle, wanted.home.engine(), purpose.outlives_the_command());
    let (hooks, stopped) = (record.hooks.clone(), hooks::state_of(&record, Status::Stopped, None));
    let outcome = wanted.make(global, purpose, record, &state);
    // The monitor has removed it unless it was killed, or never was.
    let removed = match &outcome {
        Ok(None) => return Ok(None),
        Err(_) if !purpose.keep => state.remove().map(|()| true),
        _ => state.remove_unless_kept(),
    };
    if removed.context("state directory")? {
        hooks::run_all("poststop", &hooks.poststop, &stopped);
    }
    outcome
}

/// A sandbox that can be made, as far as can be told without making anything.
struct Wanted {
    started_ns: u64,
    trace: Trace,
    options: Options,
    settings: Settings,
    bundle: Bundle,
    limits: Limits,
    home: Home,
    cgroup: cgroup::Wanted,
    terminal: Option<WindowSize>,
    pidfd_socket: Option<PidfdSocket>,
}

impl Wanted {
    fn check(global: &Global, options: Options, purpose: Purpose) -> anyhow::Result<Self> {
        let started_ns = u64::try_from(phases::now().as_nanos())?;
        refuse_descriptors(options.preserve_fds)?;
        bundle::validate_id(&options.id).map_err(|error| anyhow!(error))?;
        let mut trace = begin_trace(&options)?;
        let settings = Settings::load(global.config.as_deref())?;
        let bundle = trace.timed("bundle", || Bundle::load(&options.bundle))?;
        privileges::check()?;
        warn_of_no_network(&bundle.spec);
        let machine = bundle::Limits { cpus: options.cpus, memory_mib: options.memory };
        let flags = Flags { machine, given: options.limits };
        let limits = Limits::collect(flags, &bundle, &settings)?;
        let find = || Home::find(global, &options, &limits, &bundle, &settings);
        let home = trace.timed("engine and size", find)?;
        let cgroup = find_cgroup(global, &bundle, &options.id)?;
        let console = console(&options, &bundle, purpose);
        let terminal = console.size(bundle.spec.process().as_ref())?;
        let pidfd_socket = options.pidfd_socket.as_deref().map(PidfdSocket::for_container);
        Ok(Self {
            started_ns,
            trace,
            settings,
            bundle,
            limits,
            home,
            cgroup,
            terminal,
            pidfd_socket: pidfd_socket.transpose()?,
            options,
        })
    }

    /// Makes it, with its state in a directory that is removed if that fails.
    fn make(
        self,
        global: &Global,
        purpose: Purpose,
        record: Record,
        state: &StateDir,
    ) -> anyhow::Result<Option<Outcome>> {
        let Self { mut trace, options, settings, bundle, limits, home, .. } = self;
        trace.timed("mount points", || bundle.make_mountpoints()).context("root.path")?;
        let (mut client, command) = Client::new()?;
        client.run_hooks(hooks_of(&record));
        client.send_pidfd(self.pidfd_socket);
        let mut launch = Launch::stand_in("monitor", &global.for_stand_in());
        let guest = home.hand_over(&settings, &mut launch);
        let raw_mode = console(&options, &bundle, purpose).attach(&mut launch, self.terminal)?;
        let config = MonitorConfig {
            record,
            mode: purpose.mode,
            cgroup: self.cgroup,
            limits: host_limits(&bundle, &guest),
            hostname: bundle.spec.hostname().clone(),
            oom_score_adj: bundle.spec.process().as_ref().and_then(Process::oom_score_adj),
            namespaces: hand_over(bundle.namespaces, &mut launch),
            container: ContainerConfig {
                id: options.id,
                config: bundle.config,
                rootfs: bundle.rootfs,
                rootfs_read_only: bundle.rootfs_read_only,
                binds: bundle.binds,
                memory_limit: bundle::memory_limit(&bundle.spec),
                step: limits.step,
                terminal: self.terminal,
            },
            guest,
            deadlines: Deadlines {
                agent: settings.agent_deadline,
                create: settings.create_deadline,
                shutdown: settings.shutdown_deadline,
            },
            state: (state.path().to_owned(), launch.give(state.share_lock()?)),
            command: launch.give(command),
            pid_file: options.pid_file.map(std::path::absolute).transpose()?,
            timings: options.timings.map(std::path::absolute).transpose()?,
            trace: trace.hand_over().map(|file| launch.give(file)),
            debug: global.debug,
            started_ns: self.started_ns,
        };
        launch.configure(&config)?;
        let outcome = client.supervise(launch);
        drop(raw_mode);
        outcome
    }
}

/// The terminal's part of the options.
fn console<'a>(options: &'a Options, bundle: &Bundle, purpose: Purpose) -> Console<'a> {
    Console {
        wanted: bundle.terminal(),
        socket: options.console_socket.as_deref(),
        attached: purpose.mode == Mode::Attached,
    }
}

/// Says that the network of the host, which a container without a network namespace has under runc,
/// is not there.
fn warn_of_no_network(spec: &Spec) {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    let is_network = |namespace: &LinuxNamespace| namespace.typ() == LinuxNamespaceType::Network;
    if !namespaces.into_iter().flatten().any(is_network) {
        tracing::warn!(
            "linux.namespaces: no network namespace: a guest cannot use the host's network, so the \
             container has a loopback interface only"
        );
    }
}

fn begin_trace(options: &Options) -> anyhow::Result<Trace> {
    let path = options.trace.as_deref();
    Trace::create(path, "kiln").with_context(|| {
        format!("--trace {}", path.map(|path| path.display().to_string()).unwrap_or_default())
    })
}

/// Where the sandbox's cgroup is to be on the host.
fn find_cgroup(global: &Global, bundle: &Bundle, id: &str) -> anyhow::Result<cgroup::Wanted> {
    let linux = bundle.spec.linux().as_ref();
    let path = linux.and_then(|linux| linux.cgroups_path().as_deref());
    let systemd = global.systemd_cgroup && (path.is_some() || cgroup::systemd_runs());
    if global.systemd_cgroup && !systemd {
        tracing::warn!(
            "--systemd-cgroup: systemd does not run on this host: kiln makes the cgroup"
        );
    }
    cgroup::Wanted::parse(path, systemd, id)
        .map_err(|reason| anyhow!("linux.cgroupsPath: {reason}"))
}

fn host_limits(bundle: &Bundle, guest: &Guest) -> cgroup::Limits {
    let machine = guest.on_host(bundle::memory_limit(&bundle.spec));
    let resources = bundle.spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    resources.map(|resources| cgroup::Limits::of(resources, machine)).unwrap_or_default()
}

fn hand_over(namespaces: Vec<Namespace>, launch: &mut Launch) -> Vec<NamespaceConfig> {
    let hand_over = |Namespace { kind, existing }| NamespaceConfig {
        kind,
        existing: existing.map(|existing| launch.give(existing)),
    };
    namespaces.into_iter().map(hand_over).collect()
}

/// Refuses `--preserve-fds` and sockets that systemd would have this process listen on,
/// sd_listen_fds(3).
///
/// # Errors
/// There are descriptors to be preserved.
pub fn refuse_descriptors(preserve_fds: u32) -> anyhow::Result<()> {
    let number = |name| std::env::var(name).ok().and_then(|value| value.parse::<u32>().ok());
    let listened = number("LISTEN_FDS").unwrap_or(0);
    if listened > 0 && number("LISTEN_PID") == Some(std::process::id()) {
        bail!(
            "LISTEN_FDS={listened}: a guest cannot be given descriptors of the host: unset it, or \
             have the container listen for itself"
        );
    }
    if preserve_fds > 0 {
        bail!(
            "--preserve-fds={preserve_fds}: a guest cannot be given descriptors of the host: leave \
             it out"
        );
    }
    Ok(())
}

/// What is run for a container on each occasion.
fn hooks_of(record: &Record) -> impl Fn(Occasion, u32) -> anyhow::Result<()> + 'static {
    let record = record.clone();
    move |occasion, pid| {
        let hooks = &record.hooks;
        match occasion {
            Occasion::Made => {
                let state = hooks::state_of(&record, Status::Creating, Some(pid));
                hooks::run("prestart", &hooks.prestart, &state)?;
                hooks::run("createRuntime", &hooks.create_runtime, &state)?;
            }
            Occasion::Started => {
                let state = hooks::state_of(&record, Status::Running, Some(pid));
                hooks::run("poststart", &hooks.poststart, &state)?;
            }
        }
        Ok(())
    }
}

fn describe(id: &str, bundle: &Bundle, engine: Engine, keep: bool) -> Record {
    let uid = nix::unistd::getuid();
    let owner = nix::unistd::User::from_uid(uid).ok().flatten();
    Record {
        oci_version: bundle.spec.version().clone(),
        id: id.to_owned(),
        status: Status::Creating,
        monitor: Monitor { pid: 0, started: 0 },
        bundle: bundle.dir.clone(),
        rootfs: bundle.rootfs.clone(),
        created: rfc3339(SystemTime::now()),
        owner: owner.map_or_else(|| uid.to_string(), |user| user.name),
        annotations: bundle.spec.annotations().clone().unwrap_or_default(),
        engine: engine.name().to_owned(),
        kept: keep,
        cgroup: cgroup::Cgroup::default(),
        network: None,
        hooks: bundle.hooks.clone(),
        end: None,
    }
}
