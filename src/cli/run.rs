//! `kiln run`: create and run a container in a sandbox of its own.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context, anyhow, bail};
use kiln_protocol::WindowSize;

use super::Global;
use crate::artefacts::Artefacts;
use crate::bundle::{self, Bundle, Host, Limits, Size};
use crate::engine;
use crate::process::Launch;
use crate::sandbox::client::Client;
use crate::sandbox::{ContainerConfig, Deadlines, Engine, GuestConfig, MonitorConfig, phases};
use crate::settings::{EngineChoice, Settings};
use crate::state::StateDir;
use crate::terminal::{self, RawMode};

/// Options of `kiln run`.
#[derive(Debug, clap::Args)]
pub struct Run {
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Write the process id that stands for the container to this file, once it runs
    #[arg(long, value_name = "FILE")]
    pid_file: Option<PathBuf>,
    /// What executes the guest's code
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// The guest's CPUs, 1 to 32
    #[arg(long, value_name = "N")]
    cpus: Option<u8>,
    /// The guest's memory in MiB, the guest's own overhead included
    #[arg(long, value_name = "MIB")]
    memory: Option<u64>,
    /// Write how long each phase took to this file, as JSON
    #[arg(long, value_name = "FILE")]
    timings: Option<PathBuf>,
    /// Accepted for compatibility: the container pivots inside its guest
    #[arg(long)]
    no_pivot: bool,
    /// Accepted for compatibility: the guest has keyrings of its own
    #[arg(long)]
    no_new_keyring: bool,
    /// Accepted for compatibility: processes of the container are the guest's to reap
    #[arg(long)]
    no_subreaper: bool,
    /// Not supported yet
    #[arg(long, value_name = "SOCKET")]
    console_socket: Option<PathBuf>,
    /// Not supported yet
    #[arg(short, long)]
    detach: bool,
    /// Not supported yet
    #[arg(long)]
    keep: bool,
    /// Not supported yet
    #[arg(long, value_name = "N", default_value_t = 0)]
    preserve_fds: u32,
    /// The container's id
    id: String,
}

/// Runs the container to its end; the exit code is its own.
pub fn run(global: &Global, run: Run) -> anyhow::Result<ExitCode> {
    let started_ns = u64::try_from(phases::now().as_nanos())?;
    refuse_unsupported(&run)?;
    bundle::validate_id(&run.id).map_err(|error| anyhow!(error))?;
    let settings = Settings::load(global.config.as_deref())?;
    let bundle = Bundle::load(&run.bundle)?;
    let guest = Guest::decide(&run, &bundle, &settings)?;
    let terminal = find_terminal(&bundle)?;
    let artefacts = Artefacts::find(global.lib_dir.as_deref().or(settings.lib_dir.as_deref()))?;
    let (kernel, agent) = (artefacts.open_kernel()?, artefacts.open_agent()?);
    let state = StateDir::create(&global.root, &run.id)?;
    bundle.make_mountpoints().context("root.path")?;

    let (client, command) = Client::new()?;
    let mut launch = Launch::monitor(&global.for_parts());
    let config = MonitorConfig {
        container: ContainerConfig {
            id: run.id,
            bundle: bundle.dir,
            config: bundle.config,
            rootfs: bundle.rootfs,
            rootfs_read_only: bundle.rootfs_read_only,
            binds: bundle.binds,
            terminal,
        },
        guest: GuestConfig {
            engine: guest.engine,
            cpus: guest.size.cpus,
            memory_mib: guest.size.memory_mib,
            kernel: launch.give(kernel),
            agent: launch.give(agent),
            kernel_args: settings.kernel_args,
            qemu: settings.qemu,
        },
        deadlines: Deadlines {
            agent: settings.agent_deadline,
            create: settings.create_deadline,
            shutdown: settings.shutdown_deadline,
        },
        state: (state.path().to_owned(), launch.give(state.share_lock()?)),
        command: launch.give(command),
        pid_file: run.pid_file,
        timings: run.timings,
        debug: global.debug,
        started_ns,
    };
    launch.configure(&config)?;
    let raw_mode = terminal.map(|_| RawMode::enter()).transpose().context("terminal")?;
    let outcome = client.supervise(launch);
    drop(raw_mode);
    // The monitor has done this unless it was killed.
    state.remove().context("state directory")?;
    let outcome = outcome?;
    match outcome.error {
        None => Ok(ExitCode::from(outcome.exit_code)),
        Some(error) => Err(super::Reported { exit_code: outcome.exit_code, error }.into()),
    }
}

fn refuse_unsupported(run: &Run) -> anyhow::Result<()> {
    let asked = [
        ("--console-socket", run.console_socket.is_some()),
        ("--detach", run.detach),
        ("--keep", run.keep),
        ("--preserve-fds", run.preserve_fds > 0),
    ];
    match asked.into_iter().find(|(_, given)| *given) {
        Some((option, _)) => bail!("{option} is not supported by kiln run yet: leave it out"),
        None => Ok(()),
    }
}

/// The machine that a container gets, from flags, annotations, the bundle and the settings.
struct Guest {
    engine: Engine,
    size: Size,
}

impl Guest {
    fn decide(run: &Run, bundle: &Bundle, settings: &Settings) -> anyhow::Result<Self> {
        let choice = match run.engine {
            Some(engine) => engine,
            None => annotation(bundle, "io.kiln.engine")?.unwrap_or(settings.engine),
        };
        let asked = Limits {
            cpus: run.cpus.or(annotation(bundle, "io.kiln.cpus")?).or(settings.cpus),
            memory_mib: run
                .memory
                .or(annotation(bundle, "io.kiln.memory-mib")?)
                .or(settings.memory_mib),
        };
        let size = Size::decide(asked, &bundle.spec, Host::detect())?;
        let choice = engine::choose(choice, &settings.qemu)?;
        choice.announce();
        Ok(Self { engine: choice.engine, size })
    }
}

fn annotation<T>(bundle: &Bundle, name: &str) -> anyhow::Result<Option<T>>
where
    T: FromStr<Err: std::fmt::Display>,
{
    let Some(text) = bundle.annotation(name) else { return Ok(None) };
    match text.parse() {
        Ok(value) => Ok(Some(value)),
        Err(error) => bail!("annotations[{name:?}]: {text:?}: {error}"),
    }
}

/// The size of the terminal on standard input, if the container is to have one.
fn find_terminal(bundle: &Bundle) -> anyhow::Result<Option<WindowSize>> {
    if !bundle.terminal() {
        return Ok(None);
    }
    // SAFETY: standard input stays open.
    let size = terminal::size(unsafe { BorrowedFd::borrow_raw(0) }.as_fd());
    match size {
        Some(size) => Ok(Some(size)),
        None => bail!(
            "process.terminal: standard input is not a terminal: set it to false, or run kiln in a \
             terminal"
        ),
    }
}
