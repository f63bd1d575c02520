//! The command line: options before the verb, then one file a verb.
//!
//! The verbs that users call have runc's names and options. The hidden ones are the processes of a
//! sandbox: each is told all it needs by a JSON document that it reads from `--config-fd`.

mod checkpoint;
mod completions;
mod console;
mod create;
mod debug;
mod delete;
mod doctor;
mod events;
mod exec;
mod features;
mod home;
mod internal;
mod kill;
mod launch;
mod list;
mod man;
mod metrics;
mod pause;
mod ps;
mod request;
mod resume;
mod run;
mod spec;
mod start;
mod state;
mod update;
mod usage;
mod verb;
mod version;
mod vm_run;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{CommandFactory, Parser};

use crate::log::{self, LogFormat};
use crate::mend;
use crate::process::keep_descriptors_to_oneself;

pub use version::SPEC_VERSION;

use verb::{Verb, Vm, VmVerb};

const PRECEDENCE: &str = "\
A setting is taken from the first of these that gives it: a flag; an annotation of the bundle \
(io.kiln.engine, io.kiln.cpus, io.kiln.memory-mib, and io.kiln.NAME for each limit's flag --NAME); \
the bundle's own limits (linux.resources.cpu, linux.resources.memory); the configuration file; the \
default.";

/// Runs OCI containers, each in a microVM of its own.
#[derive(Debug, Parser)]
#[command(name = "kiln", disable_version_flag = true, after_help = PRECEDENCE)]
struct Arguments {
    #[command(flatten)]
    global: Global,
    /// Print the versions of kiln, its protocol, its guest kernel and its agent
    #[arg(short = 'v', long)]
    version: bool,
    #[command(subcommand)]
    verb: Option<Verb>,
}

/// Options that stand before the verb.
#[derive(Debug, clap::Args)]
pub struct Global {
    /// Where the state of sandboxes is kept
    #[arg(long, value_name = "DIR", default_value = "/run/kiln")]
    pub root: PathBuf,
    /// Append log lines and the final error to this file
    #[arg(long, value_name = "FILE")]
    pub log: Option<PathBuf>,
    /// The form of log lines
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Log debugging lines, and all of them to standard error if there is no --log
    #[arg(long)]
    pub debug: bool,
    /// Have systemd make the cgroup on the host: linux.cgroupsPath is slice:prefix:name then
    #[arg(long)]
    pub systemd_cgroup: bool,
    /// Accepted for compatibility: whether kiln may touch cgroups is found out, not told
    #[arg(long, value_name = "WHEN", value_parser = ["true", "false", "auto"], hide = true)]
    pub rootless: Option<String>,
    /// Accepted for compatibility
    #[arg(long, value_name = "FILE", hide = true)]
    pub criu: Option<PathBuf>,
    /// The configuration file [default: /etc/kiln/config.toml if it exists]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// The folder of the guest kernel and the agent [default: KILN_LIB_DIR, ../lib/kiln beside the
    /// executable, /usr/lib/kiln]
    #[arg(long, value_name = "DIR")]
    pub lib_dir: Option<PathBuf>,
}

impl Global {
    /// The options that a process gets too that stands for one in a guest: how it logs, and where.
    pub fn for_stand_in(&self) -> Vec<OsString> {
        let log = self.log.iter().flat_map(|path| [OsString::from("--log"), path.into()]);
        log.chain(self.for_parts()).collect()
    }

    /// The options that the processes of a machine get too: how they log, on standard error. They
    /// close every file but those that they are given to serve their guest with, a log's too.
    pub fn for_parts(&self) -> Vec<OsString> {
        let mut options = Vec::new();
        if self.log_format == LogFormat::Json {
            options.extend(["--log-format", "json"].map(OsString::from));
        }
        if self.debug {
            options.push("--debug".into());
        }
        options
    }
}

/// An error that comes with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Reported {
    /// The status to exit with.
    pub exit_code: u8,
    /// What went wrong.
    pub error: String,
}

/// Parses the command line, runs the verb and reports its error.
pub fn main() -> ExitCode {
    keep_descriptors_to_oneself();
    let given: Vec<OsString> = std::env::args_os().collect();
    let arguments = match Arguments::try_parse_from(&given) {
        Ok(arguments) => arguments,
        Err(error) => return usage::report(&error, &given),
    };
    let is_part = arguments.verb.as_ref().is_some_and(Verb::is_part_of_sandbox);
    let log = match log::start(&arguments.global, is_part) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("kiln: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    match dispatch(arguments) {
        Ok(code) => code,
        Err(error) => {
            let message = format!("{error:#}");
            match error.downcast_ref::<Reported>() {
                // It has been explained where it came about.
                Some(reported) => {
                    log.report(&message);
                    reported.exit_code.into()
                }
                None => {
                    log.report(&mend::append(&message));
                    ExitCode::FAILURE
                }
            }
        }
    }
}

fn dispatch(arguments: Arguments) -> anyhow::Result<ExitCode> {
    let global = &arguments.global;
    if arguments.version {
        return version::print(global);
    }
    let Some(verb) = arguments.verb else {
        Arguments::command().print_help()?;
        return Ok(ExitCode::FAILURE);
    };
    match verb {
        Verb::Create(create) => create::run(global, create),
        Verb::Start(start) => start::run(global, &start),
        Verb::Run(run) => run::run(global, run),
        Verb::Exec(exec) => exec::run(global, exec),
        Verb::Ps(ps) => ps::run(global, &ps),
        Verb::Pause(pause) => pause::run(global, &pause),
        Verb::Resume(resume) => resume::run(global, &resume),
        Verb::Events(events) => events::run(global, &events),
        Verb::Update(update) => update::run(global, &update),
        Verb::State(state) => state::run(global, &state),
        Verb::Kill(kill) => kill::run(global, &kill),
        Verb::Delete(delete) => delete::run(global, &delete),
        Verb::List(list) => list::run(global, &list),
        Verb::Features(features) => features::run(global, &features),
        Verb::Checkpoint(_) => checkpoint::refuse("checkpoint"),
        Verb::Restore(_) => checkpoint::refuse("restore"),
        Verb::Spec(spec) => spec::run(&spec),
        Verb::Metrics(metrics::Metrics {}) => metrics::run(global),
        Verb::Debug(debug) => debug::run(global, &debug),
        Verb::Doctor(doctor) => doctor::run(global, &doctor),
        Verb::Completions(completions) => completions::run(&completions),
        Verb::Man(man) => man::run(&man),
        Verb::Vm(Vm { verb: VmVerb::Run(vm_run) }) => vm_run::run(global, vm_run),
        Verb::Monitor(config) => internal::monitor(config),
        Verb::ExecProxy(config) => internal::exec_proxy(config),
        Verb::Vmm(config) => internal::vmm(config),
        Verb::Devices(config) => internal::devices(config),
        Verb::Fs(config) => internal::fs(config),
        Verb::OomVictim(config) => internal::oom_victim(config),
    }
}
