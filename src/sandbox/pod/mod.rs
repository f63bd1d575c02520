//! The containers of a pod in one machine: what passes between their monitors and the sandbox's.
//!
//! Each container of a pod has a monitor of its own, which is all that a container's monitor is: it
//! has the standard streams, the cgroup, the namespaces and the state directory, serves later
//! commands and exits with the status. What it hasn't is a machine. Instead it asks the monitor of the
//! pod's sandbox to be taken in ([`Request::Join`](super::control::Request::Join)), and gets
//!
//! * the places of its root file system and bind mounts in the share of the running machine
//!   ([`additions`]);
//! * a connection that is to it what the agent's is to the sandbox's monitor: the same frames both ways,
//!   of which that passes on what is about this container, and nothing else;
//! * a second descriptor of the [broker](super::broker)'s socket, for its streams.
//!
//! The connection is the membership. It begins as if the greetings had been exchanged. Its end, or a
//! [`Shutdown`](kiln_protocol::ToAgent::Shutdown) on it, is the container's: what still runs in the
//! guest is killed, its files leave the share, and then the sandbox's monitor closes its end too.

mod additions;

use std::path::PathBuf;

use kiln_protocol::ToAgent;
use serde::{Deserialize, Serialize};

pub use additions::{Additions, Attached};

use super::control::Asker;
use crate::bundle::Bind;

/// A container that is to be taken in. The mount namespace in which its paths mean something comes
/// with it as a descriptor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Join {
    /// Its id.
    pub container: String,
    /// The root file system's directory.
    pub rootfs: PathBuf,
    /// The container may not write to it.
    pub rootfs_read_only: bool,
    /// The bind mounts.
    pub binds: Vec<Bind>,
}

/// The answer to a container that is taken in. The connection and the broker's socket come with it.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Membership {
    /// The machine's memory in MiB.
    pub memory_mib: u64,
    /// The first of the numbers from which it names its streams.
    pub first_token: u64,
    /// Where its root file system is in the share.
    pub rootfs: String,
    /// Where its bind mounts are, in their order.
    pub binds: Vec<String>,
}

/// Names a container of the pod to the sandbox's monitor; none is given twice.
pub type MemberId = u32;

/// What happens to the containers of a pod.
#[derive(Debug)]
pub enum PodEvent {
    /// The files of one are in the share, or can't be.
    Attached {
        /// The container.
        join: Join,
        /// Its monitor.
        asker: Asker,
        /// Where.
        result: anyhow::Result<Attached>,
    },
    /// Its monitor has something for the agent.
    Said(MemberId, ToAgent),
    /// Its monitor has ended, or doesn't keep to the protocol.
    Gone(MemberId),
    /// Its files have left the share.
    Detached(MemberId),
}
