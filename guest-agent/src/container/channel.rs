//! Messages between the agent and a process of a container while it sets itself up.
//!
//! A `SOCK_SEQPACKET` pair, so that each message is a packet and a descriptor can go with it. The
//! process's end closes when it executes its program, or when it dies.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::failure::Failure;

/// What the process tells the agent.
#[derive(Debug, Serialize, Deserialize)]
pub enum Report {
    /// A process has been born in a container that it joins; what follows comes from there.
    Born {
        /// Its id, in the agent's PID namespace.
        pid: libc::pid_t,
    },
    /// Set up but for the execution of the program. The terminal's master goes with it, if there is
    /// a terminal.
    Ready,
    /// Set-up or execution failed; the process exits.
    Failed(Failure),
}

/// What the agent tells the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Id mappings and cgroup are in place: set up.
    Prepare,
    /// Execute the program.
    Execute,
}

/// Longest report, in bytes. Messages name paths, which are at most `PATH_MAX` long, a few times.
const MAX_REPORT: usize = 32 << 10;

/// One end of the channel.
#[derive(Debug)]
pub struct Channel {
    socket: OwnedFd,
}

impl Channel {
    /// A pair of ends.
    ///
    /// # Errors
    /// As socketpair(2).
    pub fn pair() -> io::Result<(Self, Self)> {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (one, other) = socketpair(family, kind, SocketFlags::CLOEXEC, None)?;
        Ok((Self { socket: one }, Self { socket: other }))
    }

    /// The socket, to be polled.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    /// Sends a command.
    ///
    /// # Errors
    /// `EPIPE` if the process is gone.
    pub fn command(&self, command: Command) -> io::Result<()> {
        let byte = match command {
            Command::Prepare => b'p',
            Command::Execute => b'e',
        };
        rustix::net::send(&self.socket, &[byte], SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Waits for one particular command.
    ///
    /// # Errors
    /// `UnexpectedEof` if the agent closed its end.
    pub fn await_command(&self, command: Command) -> io::Result<()> {
        let mut byte = [0];
        let (length, _) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut byte, RecvFlags::empty())
        })?;
        let expected = match command {
            Command::Prepare => b'p',
            Command::Execute => b'e',
        };
        match (length, byte[0] == expected) {
            (0, _) => Err(io::ErrorKind::UnexpectedEof.into()),
            (_, true) => Ok(()),
            (_, false) => Err(io::ErrorKind::InvalidData.into()),
        }
    }

    /// Sends a report, with a descriptor if there is one.
    ///
    /// # Errors
    /// `EPIPE` if the agent closed its end.
    pub fn report(&self, report: &Report, descriptor: Option<&OwnedFd>) -> io::Result<()> {
        let bytes = serde_json::to_vec(report)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let descriptors = descriptor.map(|descriptor| [descriptor.as_fd()]);
        if let Some(descriptors) = &descriptors {
            ancillary.push(SendAncillaryMessage::ScmRights(descriptors));
        }
        sendmsg(&self.socket, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        Ok(())
    }

    /// Takes the next report without waiting: `None` if the other end has closed.
    ///
    /// # Errors
    /// `WouldBlock` if there is none yet, `InvalidData` if it is no report.
    pub fn take_report(&self) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
        let mut bytes = vec![0; MAX_REPORT];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received =
            recvmsg(&self.socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags)?;
        if received.bytes == 0 {
            return Ok(None);
        }
        let descriptor = ancillary.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
            _ => None,
        });
        let report = serde_json::from_slice(&bytes[..received.bytes])?;
        Ok(Some((report, descriptor)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reports_carry_a_descriptor_and_end_with_the_other_end() {
        let (agent, process) = Channel::pair().expect("pair");
        assert_eq!(agent.take_report().expect_err("none").kind(), io::ErrorKind::WouldBlock);
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        process.report(&Report::Ready, Some(&writer)).expect("sends");
        let (report, descriptor) = agent.take_report().expect("takes").expect("a report");
        assert!(matches!(report, Report::Ready));
        drop(writer);
        rustix::io::write(descriptor.expect("descriptor"), b"x").expect("writes");
        let mut byte = [0];
        rustix::io::read(reader, &mut byte).expect("reads");
        assert_eq!(byte, *b"x");
        drop(process);
        assert!(agent.take_report().expect("ends").is_none());
        assert!(agent.command(Command::Execute).is_err());
    }
}
