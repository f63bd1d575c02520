//! A machine of the kvm engine: run by this process itself, or by one beside it.
//!
//! Whoever runs a guest is in a jail for good. A command that has nothing left to do after the
//! guest's end but to say how it ended runs it itself, which spares a second process.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, IntoRawFd, OwnedFd};
use std::process::Stdio;

use anyhow::{Context, bail};
use kiln_vmm::config::{
    BootConfig, ConsoleConfig, DiskConfig, Entry, InheritedFd, JailConfig, MachineConfig,
    VmmConfig, VmmEvent,
};
use kiln_vmm::kvm::{KvmError, run_alone};
use nix::sys::socket::MsgFlags;

use super::console::{Console, standard};
use super::wait::{First, Signals};
use super::{Disk, End, Machine};
use crate::process::{Launch, describe};
use crate::sandbox::packet;

/// What a machine is made of besides what was asked for.
#[derive(Debug)]
pub struct Host {
    /// `/dev/kvm`, opened.
    pub kvm: File,
    /// Who the process becomes that runs it.
    pub jail: JailConfig,
}

/// Runs a machine to its end in this process, which from then on is in the machine's jail: it can
/// write to standard error and exit. Standard input is the console's and no terminal.
///
/// # Errors
/// The machine can't be made or run.
pub fn run_here(machine: Machine, host: Host) -> anyhow::Result<End> {
    let signals = Signals::block()?;
    let give = |fd: OwnedFd| InheritedFd(fd.into_raw_fd());
    let config = configure(machine, host, standard(0)?, give)?;
    // SAFETY: the descriptors were given up just now, and nothing here has another.
    match unsafe { run_alone(config, signals.as_fd()) } {
        Ok(how) => Ok(End::Guest(how)),
        Err(KvmError::Stopped) => Ok(End::Interrupted(signals.taken()?)),
        Err(error) => Err(anyhow::Error::new(error).context("machine")),
    }
}

/// Runs a machine to its end in a process beside this one. `options` say how that logs.
///
/// # Errors
/// The machine can't be made, or its process failed.
pub fn run_beside(machine: Machine, host: Host, options: &[OsString]) -> anyhow::Result<End> {
    let signals = Signals::block()?;
    let (control, their_control) = packet::pair()?;
    let console = Console::on_terminal().context("terminal")?;
    let mut launch = Launch::verb("vmm", options);
    let input = match &console {
        Some(console) => console.input.as_fd().try_clone_to_owned()?,
        None => standard(0)?,
    };
    let machine = configure(machine, host, input, |fd| launch.give(fd))?;
    let config = VmmConfig { machine, control: launch.give(their_control) };
    launch.configure(&config)?.alone();
    launch.stdio(Stdio::null(), Stdio::null(), Stdio::inherit());
    let mut process = launch.spawn().context("machine process")?;
    let keyboard = console.as_ref().map(|console| console.ended.as_fd());
    loop {
        if let First::Interrupted(why) = signals.wait(control.as_fd(), keyboard)? {
            return Ok(End::Interrupted(why));
        }
        match packet::receive(control.as_fd(), MsgFlags::empty())? {
            Some(VmmEvent::Running | VmmEvent::SpaceUsedUp) => {}
            Some(VmmEvent::Ended { how }) => {
                process.wait()?;
                return Ok(End::Guest(how));
            }
            Some(VmmEvent::Failed { message }) => {
                process.wait()?;
                bail!("machine process: {message}")
            }
            None => bail!("machine process {}", describe(process.wait()?)),
        }
    }
}

/// The machine as its process is told of it; `give` hands a descriptor over to that process.
fn configure(
    machine: Machine,
    host: Host,
    input: OwnedFd,
    mut give: impl FnMut(OwnedFd) -> InheritedFd,
) -> anyhow::Result<MachineConfig> {
    let cmdline = machine.cmdline("k");
    let limits = machine.disk_limits;
    let disks = machine.disks.into_iter().map(|Disk { file, read_only }| DiskConfig {
        file: give(file.into()),
        read_only,
        limits,
    });
    let disks = disks.collect();
    Ok(MachineConfig {
        id: format!("vm-{}", std::process::id()),
        kvm: give(host.kvm.into()),
        memory_mib: machine.memory_mib,
        cpus: machine.cpus,
        boot: BootConfig {
            kernel: give(machine.kernel.into()),
            initrd: machine.initrd.map(|initrd| give(initrd.into())),
            cmdline,
            entry: Entry::Auto,
        },
        console: ConsoleConfig {
            kind: machine.console,
            input: Some(give(input)),
            output: Some(give(standard(1)?)),
        },
        disks,
        shares: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        jail: host.jail,
    })
}
