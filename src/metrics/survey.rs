//! Asks the monitors of many sandboxes at once, each of which may be unable to answer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use kiln_protocol::Statistics;
use nix::sys::socket::MsgFlags;
use serde::de::DeserializeOwned;

use crate::readiness::readable_by;
use crate::sandbox::control::{self, Reply, Request};
use crate::sandbox::inspection::Inspection;
use crate::sandbox::{document, packet};
use crate::state::{Container, Status};

/// How long a monitor may take to accept a connection.
const CONNECTION: Duration = Duration::from_millis(100);
/// How long all answers together may take.
const ANSWERS: Duration = Duration::from_secs(3);

/// What a sandbox answered.
#[derive(Debug)]
pub struct Answers {
    /// The monitor.
    pub inspection: anyhow::Result<Inspection>,
    /// The guest.
    pub figures: anyhow::Result<Statistics>,
}

/// Asks; the answers are in the order of the containers. `None` is one that has stopped.
pub fn ask_all(containers: &[Container]) -> Vec<Option<Answers>> {
    let asked: Vec<_> = containers
        .iter()
        .map(|container| (container.status() != Status::Stopped).then(|| ask(container)))
        .collect();
    let deadline = Instant::now() + ANSWERS;
    asked.into_iter().map(|asked| asked.map(|connection| hear(connection, deadline))).collect()
}

fn ask(container: &Container) -> io::Result<OwnedFd> {
    let connection = control::reach_within(container, Some(CONNECTION))?;
    // The monitor answers in this order: it can itself when the guest can't.
    for request in [Request::Inspect, Request::Statistics] {
        packet::send_with(connection.as_fd(), &request, &[])?;
    }
    Ok(connection)
}

fn hear(connection: io::Result<OwnedFd>, deadline: Instant) -> Answers {
    let connection = match connection {
        Ok(connection) => connection,
        Err(error) => {
            let why = format!("the sandbox's monitor takes no questions: {error}");
            let (inspection, figures) = (Err(anyhow::anyhow!("{why}")), Err(anyhow::anyhow!(why)));
            return Answers { inspection, figures };
        }
    };
    let inspection = receive(&connection, deadline).context("the sandbox's monitor");
    let figures = match &inspection {
        Ok(_) => receive(&connection, deadline).context("the guest's agent"),
        // What would come next is not known to be the figures.
        Err(error) => Err(anyhow::anyhow!("{error:#}")),
    };
    Answers { inspection, figures }
}

fn receive<T: DeserializeOwned>(connection: &OwnedFd, deadline: Instant) -> anyhow::Result<T> {
    if !readable_by(connection.as_fd(), Some(deadline))? {
        bail!("it did not answer within {} s", ANSWERS.as_secs());
    }
    match packet::receive_with(connection.as_fd(), MsgFlags::empty())? {
        None => bail!("it has ended"),
        Some((Reply::Document, descriptors)) => {
            Ok(serde_json::from_str(document::read(descriptors)?.get())?)
        }
        Some((Reply::Failed { message, .. }, _)) => bail!(message),
        Some((other, _)) => bail!("it answers with {other:?}"),
    }
}
