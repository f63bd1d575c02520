//! The verbs.
//!
//! Most of what a command line's definition costs at every start is the options of verbs that
//! aren't called: each verb's are made when it is called, or all are asked for.

use clap::{ArgMatches, Command, Error, FromArgMatches, Subcommand};

use super::{
    checkpoint, completions, create, debug, delete, doctor, events, exec, features, internal, kill,
    list, man, metrics, pause, ps, resume, run, spec, start, state, update, vm_run,
};

/// Makes an enum of a list: what help says of a verb, whether help shows it, its name, its variant
/// and its options. A group has verbs of its own, which completions want to know at once.
macro_rules! verbs {
    (
        $(#[$meta:meta])*
        enum $verbs:ident {
            $(#[doc = $about:literal] $kind:ident $name:literal $verb:ident($options:ty);)+
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug)]
        #[allow(dead_code, reason = "a verb that is refused takes any options and reads none")]
        pub enum $verbs {
            $(#[doc = $about] $verb($options),)+
        }

        impl Subcommand for $verbs {
            fn augment_subcommands(command: Command) -> Command {
                command$(.subcommand({
                    let options = |verb: Command| {
                        let verb = <$options as clap::Args>::augment_args(verb);
                        verb.about($about.trim()).long_about(None)
                    };
                    let verb = Command::new($name).about($about.trim());
                    match stringify!($kind) {
                        "group" => options(verb),
                        "hidden" => verb.hide(true).defer(options),
                        _ => verb.defer(options),
                    }
                }))+
            }

            fn augment_subcommands_for_update(command: Command) -> Command {
                Self::augment_subcommands(command)
            }

            fn has_subcommand(name: &str) -> bool {
                matches!(name, $($name)|+)
            }
        }

        impl FromArgMatches for $verbs {
            fn from_arg_matches(matches: &ArgMatches) -> Result<Self, Error> {
                Self::from_arg_matches_mut(&mut matches.clone())
            }

            fn from_arg_matches_mut(matches: &mut ArgMatches) -> Result<Self, Error> {
                let Some((name, mut options)) = matches.remove_subcommand() else {
                    return Err(Error::raw(clap::error::ErrorKind::MissingSubcommand, "no verb"));
                };
                match name.as_str() {
                    $($name => <$options>::from_arg_matches_mut(&mut options).map(Self::$verb),)+
                    _ => Err(Error::raw(clap::error::ErrorKind::InvalidSubcommand, name)),
                }
            }

            fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), Error> {
                Self::from_arg_matches(matches).map(|verb| *self = verb)
            }
        }
    };
}

verbs! {
    /// A verb with its options.
    enum Verb {
        /// Set a container up to just before its program is executed
        shown "create" Create(create::Create);
        /// Execute the program of a created container
        shown "start" Start(start::Start);
        /// Create and start a container
        shown "run" Run(run::Run);
        /// Execute a further program in a running container
        shown "exec" Exec(exec::Exec);
        /// List a container's processes
        shown "ps" Ps(ps::Ps);
        /// Have all processes of a container stand still
        shown "pause" Pause(pause::Pause);
        /// Let the processes of a paused container go on
        shown "resume" Resume(resume::Resume);
        /// Print a container's figures at intervals, and when its memory runs out
        shown "events" Events(events::Events);
        /// Change a container's limits
        shown "update" Update(update::Update);
        /// Print a container's state as JSON
        shown "state" State(state::State);
        /// Send a signal to a container's processes
        shown "kill" Kill(kill::Kill);
        /// Remove what is left of a container
        shown "delete" Delete(delete::Delete);
        /// List the containers
        shown "list" List(list::List);
        /// Print what kiln honours in a bundle's config.json, as JSON
        shown "features" Features(features::Features);
        /// Not supported
        hidden "checkpoint" Checkpoint(checkpoint::Anything);
        /// Not supported
        hidden "restore" Restore(checkpoint::Anything);
        /// Write a bundle's config.json
        shown "spec" Spec(spec::Spec);
        /// Print the figures of all sandboxes, for Prometheus
        shown "metrics" Metrics(metrics::Metrics);
        /// Collect what is known of a container into an archive, without secrets
        shown "debug" Debug(debug::Debug);
        /// Check what this host can do and say how to mend what it can't
        shown "doctor" Doctor(doctor::Doctor);
        /// Print a shell's completions
        shown "completions" Completions(completions::Completions);
        /// Write the manual pages
        shown "man" Man(man::Man);
        /// Virtual machines without containers
        group "vm" Vm(Vm);
        /// The process that stands for a sandbox
        hidden "monitor" Monitor(internal::Internal);
        /// The process that stands for a further program in a container
        hidden "exec-proxy" ExecProxy(internal::Internal);
        /// Processes that the kernel kills, for the host's count of such kills
        hidden "oom-victim" OomVictim(internal::Internal);
        /// The machine of the kvm engine
        hidden "vmm" Vmm(internal::Internal);
        /// The devices of the emulated engine
        hidden "devices" Devices(internal::Internal);
        /// The virtio-fs backend
        hidden "fs" Fs(internal::Internal);
    }
}

impl Verb {
    /// Its process is one that the monitor started, and reads from.
    pub fn is_part_of_sandbox(&self) -> bool {
        matches!(self, Self::Vmm(_) | Self::Devices(_) | Self::Fs(_))
    }
}

/// What follows `kiln vm`.
#[derive(Debug, clap::Args)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Vm {
    #[command(subcommand)]
    pub verb: VmVerb,
}

verbs! {
    /// A verb of `kiln vm`.
    enum VmVerb {
        /// Boot a kernel with its serial console on standard input and output
        shown "run" Run(vm_run::VmRun);
    }
}
