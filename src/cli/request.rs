//! What the verbs share that ask a container's monitor for one thing.

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

use super::Reported;
use crate::sandbox::control::{self, Reply, Request};
use crate::sandbox::document;
use crate::state::{Container, Status};

/// Has the monitor do something.
///
/// # Errors
/// It doesn't; or it is about to end, or has: then the container is not running.
pub fn perform(
    container: &Container,
    request: Request,
    descriptors: &[OwnedFd],
) -> anyhow::Result<ExitCode> {
    match ask(container, request, descriptors)?.0 {
        Reply::Done => Ok(ExitCode::SUCCESS),
        other => bail!("the monitor answers with {other:?}"),
    }
}

/// Fetches a document from the monitor.
///
/// # Errors
/// As [`perform`].
pub fn fetch<T: DeserializeOwned>(container: &Container, request: Request) -> anyhow::Result<T> {
    match ask(container, request, &[])? {
        (Reply::Document, descriptors) => {
            let document = document::read(descriptors).context("the monitor's answer")?;
            Ok(serde_json::from_str(document.get()).context("the monitor's answer")?)
        }
        (other, _) => bail!("the monitor answers with {other:?}"),
    }
}

fn ask(
    container: &Container,
    request: Request,
    descriptors: &[OwnedFd],
) -> anyhow::Result<(Reply, Vec<OwnedFd>)> {
    match control::ask(container, request, descriptors) {
        Ok((Reply::Failed { message, .. }, _)) => {
            Err(Reported { exit_code: 1, error: message }.into())
        }
        Ok(reply) => Ok(reply),
        Err(error) if is_ending(container, &error) => Err(not_running().into()),
        Err(error) => Err(error).context("the sandbox's monitor"),
    }
}

/// The refusal of what only a running container can do.
pub fn not_running() -> Reported {
    Reported { exit_code: 1, error: "container not running".to_owned() }
}

/// Whether that is why the monitor can't be reached: it is about to end, or has.
pub fn is_ending(container: &Container, error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionRefused, ConnectionReset, NotFound};

    let ended = matches!(error.kind(), BrokenPipe | ConnectionRefused | ConnectionReset | NotFound);
    ended || container.status() == Status::Stopped
}
