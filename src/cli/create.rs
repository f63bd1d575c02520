//! `kiln create`: set a container up to just before its program is executed.

use std::process::ExitCode;

use super::launch::{self, Options, Purpose};
use super::{Global, Reported};
use crate::sandbox::Mode;

/// Options of `kiln create`.
#[derive(Debug, clap::Args)]
pub struct Create {
    #[command(flatten)]
    options: Options,
}

/// Returns once the container waits for `kiln start`.
pub fn run(global: &Global, create: Create) -> anyhow::Result<ExitCode> {
    let purpose = Purpose { mode: Mode::Create, keep: true };
    let Some(outcome) = launch::launch(global, create.options, purpose)? else {
        return Ok(ExitCode::SUCCESS);
    };
    let error = outcome.error.unwrap_or_else(|| "the container ended in its set-up".to_owned());
    Err(Reported { exit_code: 1, error }.into())
}
