//! What `kiln devices` runs: the devices that QEMU's guest gets from kiln, each served over
//! vhost-user on a thread of its own.
//!
//! The process jails itself before it opens its first connection, and says
//! [`VmmEvent::Running`] once QEMU can connect. It ends when the other end of the control socket is
//! closed. QEMU going away does not end it: what the guest has sent over vsock is still passed on
//! to whoever reads it.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::{Arc, mpsc};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::SendFlags;

use crate::config::{DevicesConfig, DiskConfig, NetConfig, VmmEvent, VsockConfig};
use crate::jail::seccomp::threads::{Thread, narrow, narrow_server};
use crate::jail::{Jail, JailError};
use crate::transport::vhost_user::{self, ServeError};
use crate::virtio::VirtioDevice;
use crate::virtio::block::{Block, OpenError};
use crate::virtio::net::{self, Net, Settings};
use crate::virtio::vsock::{NewError, Vsock};

/// Why devices can be served no more.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// The process can't be jailed.
    #[error("device process can't be jailed")]
    Jail(#[source] JailError),
    /// A disk of the configuration.
    #[error("disk {index}")]
    Disk {
        /// Its place in the configuration, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: OpenError,
    },
    /// A network device of the configuration.
    #[error("network device {index}")]
    Net {
        /// Its place in the configuration, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: net::NewError,
    },
    /// The vsock device of the configuration.
    #[error("vsock device")]
    Vsock(#[source] NewError),
    /// A device stopped being served.
    #[error("device {name} can't be served")]
    Serve {
        /// Which.
        name: String,
        /// Why.
        #[source]
        source: ServeError,
    },
    /// A thread can't be started.
    #[error("thread can't be started")]
    Thread(#[source] io::Error),
    /// The control socket.
    #[error("control socket")]
    Control(#[source] io::Error),
}

/// A device, where QEMU connects to it, what its thread does, and its name for log lines.
struct Served {
    name: String,
    kind: Thread,
    device: Box<dyn VirtioDevice>,
    listener: UnixListener,
}

/// Serves the devices of `config` until the other end of its control socket is closed. What stops a
/// device early is reported there before it is returned.
///
/// # Errors
/// A jail or a device that can't be set up; a device that can be served no more. The process must
/// then end.
///
/// # Safety
/// The descriptors that `config` names are open and belong to nothing else in this process. Nothing
/// else in the process needs a descriptor: all others are closed.
pub unsafe fn serve(config: DevicesConfig) -> Result<(), DevicesError> {
    // SAFETY: the caller's promise.
    let control = unsafe { config.control.take() };
    let kept = descriptors(&config);
    let jail = Jail::devices(config.jail, control.as_fd(), &kept);
    let served = jail.enter().map_err(DevicesError::Jail).and_then(|()| {
        // SAFETY: the caller's promise.
        let devices = unsafe { make(config) }?;
        run(devices, control.as_fd())
    });
    if let Err(error) = &served {
        let message = text(error);
        // If nobody listens any more there is nobody to tell.
        let _ = report(control.as_fd(), &VmmEvent::Failed { message });
    }
    served
}

fn descriptors(config: &DevicesConfig) -> Vec<RawFd> {
    let vsock = config.vsock.iter().flat_map(|(vsock, listener)| [vsock.broker.0, listener.0]);
    let disks = config.disks.iter().flat_map(|(disk, listener)| [disk.file.0, listener.0]);
    let nets = config.nets.iter().flat_map(|(net, listener)| [net.tap.0, listener.0]);
    vsock.chain(disks).chain(nets).chain([libc::STDERR_FILENO]).collect()
}

/// Takes the descriptors over and makes the devices.
///
/// # Safety
/// As for [`serve`].
unsafe fn make(config: DevicesConfig) -> Result<Vec<Served>, DevicesError> {
    let mut devices = Vec::new();
    if let Some((vsock, listener)) = config.vsock {
        let VsockConfig { guest_cid, broker, host_ports } = vsock;
        // SAFETY: the caller's promise.
        let (broker, listener) = unsafe { (broker.take(), listener.take()) };
        let device = Vsock::new(guest_cid, &host_ports, broker).map_err(DevicesError::Vsock)?;
        devices.push(Served {
            name: "vsock".to_owned(),
            kind: Thread::Streams,
            device: Box::new(device),
            listener: UnixListener::from(listener),
        });
    }
    for (index, (disk, listener)) in config.disks.into_iter().enumerate() {
        let DiskConfig { file, read_only, limits } = disk;
        // SAFETY: the caller's promise.
        let (file, listener): (OwnedFd, OwnedFd) = unsafe { (file.take(), listener.take()) };
        let name = format!("disk{index}");
        let device = Block::new(File::from(file), read_only, &name)
            .and_then(|device| device.limited(limits))
            .map_err(|source| DevicesError::Disk { index, source })?;
        devices.push(Served {
            name,
            kind: Thread::Storage,
            device: Box::new(device),
            listener: UnixListener::from(listener),
        });
    }
    for (index, (net, listener)) in config.nets.into_iter().enumerate() {
        let NetConfig { tap, mac, mtu, receive, transmit } = net;
        // SAFETY: the caller's promise.
        let (tap, listener) = unsafe { (tap.take(), listener.take()) };
        let device = Net::new(tap, Settings { mac, mtu, receive, transmit })
            .map_err(|source| DevicesError::Net { index, source })?;
        devices.push(Served {
            name: format!("net{index}"),
            kind: Thread::Network,
            device: Box::new(device),
            listener: UnixListener::from(listener),
        });
    }
    Ok(devices)
}

/// Serves the devices. Returns the first error, with the other devices still being served.
fn run(devices: Vec<Served>, control: BorrowedFd<'_>) -> Result<(), DevicesError> {
    let until = Arc::new(control.try_clone_to_owned().map_err(DevicesError::Control)?);
    let (ended, endings) = mpsc::channel();
    for Served { name, kind, device, listener } in devices {
        let (until, ended) = (until.clone(), ended.clone());
        let serve = move || {
            narrow_server(kind);
            let result = vhost_user::serve(device, &listener, until.as_fd());
            let result = result.map_err(|source| DevicesError::Serve { name, source });
            // Fails only after another device's error has ended the wait.
            let _ = ended.send(result);
        };
        thread::Builder::new()
            .name("device".to_owned())
            .spawn(serve)
            .map_err(DevicesError::Thread)?;
    }
    drop(ended);
    narrow(Thread::Waiting);
    report(control, &VmmEvent::Running).map_err(DevicesError::Control)?;
    endings.into_iter().collect::<Result<(), _>>()?;
    wait_for_end(control)
}

/// Waits until the other end of the control socket is closed.
fn wait_for_end(control: BorrowedFd<'_>) -> Result<(), DevicesError> {
    loop {
        match poll(&mut [PollFd::from_borrowed_fd(control, PollFlags::RDHUP)], None) {
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(DevicesError::Control(error.into())),
            Ok(_) => return Ok(()),
        }
    }
}

fn report(control: BorrowedFd<'_>, event: &VmmEvent) -> io::Result<()> {
    let packet = serde_json::to_vec(event)?;
    rustix::net::send(control, &packet, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// An error with its sources.
fn text(error: &dyn std::error::Error) -> String {
    let sources = std::iter::successors(error.source(), |error| error.source());
    sources.fold(error.to_string(), |text, source| format!("{text}: {source}"))
}
