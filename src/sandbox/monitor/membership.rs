//! A container that is set up in the machine of its pod's sandbox: the part of its own monitor that
//! differs from a container's with a machine of its own ([`pod`](crate::sandbox::pod)).

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::rc::Rc;

use anyhow::{Context, anyhow, bail};
use kiln_vmm::virtio::vsock::broker::Broker as Socket;

use super::failure::Failure;
use super::life::{Files, deadline};
use super::{Monitor, Step, second};
use crate::sandbox::broker::Broker;
use crate::sandbox::control::{Reply, Request};
use crate::sandbox::pod::{Join, Membership};
use crate::sandbox::stdio::Tokens;
use crate::sandbox::{Guest, document, packet};

/// The status of a container whose sandbox has ended: that of one that is killed.
const SANDBOX_ENDED: u8 = 128 + 9;

impl Monitor {
    /// Has the monitor of the pod's sandbox take the container in.
    pub(super) async fn join_pod(
        &mut self,
        sandbox: OwnedFd,
    ) -> Result<(Rc<Broker>, Files), Failure> {
        let state = self.state.as_ref().context("no state directory")?;
        state.write(&self.record).context("state.json")?;
        self.sources.watch_monitor(second(&sandbox).context("descriptors")?).context("runtime")?;
        self.ask_to_join(&sandbox)?;
        let mut deadline = deadline(self.deadlines.agent);
        let (reply, descriptors) = loop {
            match self.next(Some(&mut deadline)).await? {
                Step::PodAnswered(reply, descriptors) => break (reply, descriptors),
                Step::PodGone => return Err(self.sandbox_ended()),
                Step::DeadlinePassed => {
                    let (sandbox, seconds) = (self.guest.sandbox(), self.deadlines.agent);
                    let error = anyhow!(
                        "the pod's sandbox {sandbox} did not take the container in within {seconds} s"
                    );
                    return Err(Failure::from(error).with_mend(
                        "for a slow host raise agent_deadline in the configuration file",
                    ));
                }
                _ => {}
            }
        };
        match reply {
            Reply::Joined => Ok(self.joined(descriptors)?),
            Reply::Failed { message, exit_code } => {
                let error = anyhow!("the pod's sandbox {}: {message}", self.guest.sandbox());
                Err(Failure::from(error).with_exit_code(exit_code))
            }
            other => Err(anyhow!("the pod's sandbox answers with {other:?}").into()),
        }
    }

    fn ask_to_join(&self, sandbox: &OwnedFd) -> anyhow::Result<()> {
        let container = &self.container;
        if let Some(bind) = container.binds.iter().find(|bind| !bind.overlay.is_empty()) {
            bail!("mounts[{}]: a container of a pod can't have an overlay: bind it", bind.index);
        }
        let join = document::write(&Join {
            container: container.id.clone(),
            rootfs: container.rootfs.clone(),
            rootfs_read_only: container.rootfs_read_only,
            binds: container.binds.clone(),
        })?;
        let namespace = File::open("/proc/self/ns/mnt").context("/proc/self/ns/mnt")?;
        let descriptors = [join, namespace.into()];
        packet::send_with(sandbox.as_fd(), &Request::Join, &descriptors)
            .with_context(|| format!("the pod's sandbox {}", self.guest.sandbox()))
    }

    fn joined(&mut self, mut descriptors: Vec<OwnedFd>) -> anyhow::Result<(Rc<Broker>, Files)> {
        let broker = descriptors.pop().context("no broker came with the answer")?;
        let connection = descriptors.pop().context("no connection came with the answer")?;
        let joined: Membership = serde_json::from_str(document::read(descriptors)?.get())?;
        if let Guest::Pod(pod) = &mut self.guest {
            pod.memory_mib = joined.memory_mib;
        }
        self.tokens = Tokens::from(joined.first_token);
        self.talk_over(UnixStream::from(connection)).map_err(|failure| failure.error)?;
        let broker = Rc::new(Broker::new(Socket::from(broker))?);
        self.broker = Some(Rc::clone(&broker));
        Ok((broker, Files { rootfs: joined.rootfs, binds: joined.binds }))
    }

    /// The machine has ended under the container.
    pub(super) fn sandbox_ended(&self) -> Failure {
        let error = anyhow!("the pod's sandbox {} has ended", self.guest.sandbox());
        Failure::from(error)
            .with_exit_code(SANDBOX_ENDED)
            .with_mend("what ended it is said by its own command, and in its log")
    }

    /// The guest was to end the container, and has not.
    pub(super) fn overdue_in_sandbox(&self) -> Failure {
        let sandbox = self.guest.sandbox();
        let error = anyhow!("the pod's sandbox {sandbox} did not end the container after SIGKILL");
        Failure::from(error).with_exit_code(128 + 9).with_mend("delete the sandbox")
    }
}
