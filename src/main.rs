//! kiln: every container in a microVM of its own, with runc's command line.
//!
//! # Shape
//! * [`cli`]: one file a verb; the hidden verbs are the processes of a sandbox.
//! * [`settings`]: what the configuration file says.
//! * [`limits`]: a sandbox's limits, from flags, annotations and the configuration file.
//! * [`engine`]: what executes the code of guests on this host.
//! * [`place`], [`cgroup`]: where the processes of a sandbox stand on the host.
//! * [`hooks`]: hooks of the host.
//! * [`network`]: the interfaces of a sandbox's network namespace, joined with its guest.
//! * [`doctor`]: what this host can do, check by check.
//! * [`metrics`]: what sandboxes take, for Prometheus.
//! * [`diagnosis`]: what is known of one sandbox, collected.
//! * [`privileges`]: what a caller must be allowed to do.
//! * [`artefacts`]: where the guest's kernel and agent are found.
//! * [`readiness`]: waiting for one descriptor.
//! * [`mend`]: what can be done about errors of the host.
//! * [`procfs`]: what the host says of a process.
//! * [`log`]: log lines and errors in the forms that callers of runc read.

mod artefacts;
mod bundle;
mod cgroup;
mod cli;
mod diagnosis;
mod doctor;
mod engine;
mod hooks;
mod initrd;
mod limits;
mod log;
mod mend;
mod metrics;
mod network;
mod place;
mod privileges;
mod process;
mod procfs;
mod readiness;
mod sandbox;
mod settings;
mod signal;
mod state;
mod terminal;
mod vm;

fn main() -> std::process::ExitCode {
    cli::main()
}
