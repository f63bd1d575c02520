//! `kiln checkpoint` and `kiln restore`: not there, and said so whatever the options.

use std::ffi::OsString;
use std::process::ExitCode;

use anyhow::bail;

/// Whatever runc's verbs take.
#[derive(Debug, clap::Args)]
pub struct Anything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, hide = true)]
    _arguments: Vec<OsString>,
}

/// Refuses.
pub fn refuse(verb: &str) -> anyhow::Result<ExitCode> {
    bail!("{verb} is not supported: a container's memory can't be taken out of its guest")
}
