//! A machine of the kvm engine.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::AsFd;
use std::process::Stdio;

use anyhow::{Context, bail};
use kiln_vmm::config::{
    BootConfig, ConsoleConfig, DiskConfig, Entry, JailConfig, MachineConfig, VmmEvent,
};
use nix::sys::socket::MsgFlags;

use super::console::{Console, standard};
use super::wait::{First, Signals};
use super::{End, Machine};
use crate::process::{Launch, describe};
use crate::sandbox::packet;

/// Runs a machine to its end. `kvm` is `/dev/kvm`, opened; `options` say how its process logs.
///
/// # Errors
/// The machine can't be made, or its process failed.
pub fn run(
    machine: Machine,
    kvm: File,
    jail: JailConfig,
    options: &[OsString],
) -> anyhow::Result<End> {
    let signals = Signals::block()?;
    let (control, their_control) = packet::pair()?;
    let console = Console::on_terminal().context("terminal")?;
    let mut launch = Launch::verb("vmm", options);
    let input = match &console {
        Some(console) => console.input.as_fd().try_clone_to_owned()?,
        None => standard(0)?,
    };
    let cmdline = machine.cmdline("k");
    let disks = machine
        .disks
        .into_iter()
        .map(|disk| DiskConfig { file: launch.give(disk.file), read_only: disk.read_only });
    let disks = disks.collect();
    let config = MachineConfig {
        id: format!("vm-{}", std::process::id()),
        kvm: launch.give(kvm),
        memory_mib: machine.memory_mib,
        cpus: machine.cpus,
        boot: BootConfig {
            kernel: launch.give(machine.kernel),
            initrd: machine.initrd.map(|initrd| launch.give(initrd)),
            cmdline,
            entry: Entry::Auto,
        },
        console: ConsoleConfig {
            kind: machine.console,
            input: Some(launch.give(input)),
            output: Some(launch.give(standard(1)?)),
        },
        disks,
        shares: Vec::new(),
        vsock: None,
        jail,
        control: launch.give(their_control),
    };
    launch.configure(&config)?;
    launch.stdio(Stdio::null(), Stdio::null(), Stdio::inherit());
    let mut process = launch.spawn().context("machine process")?;
    let keyboard = console.as_ref().map(|console| console.ended.as_fd());
    loop {
        if let First::Interrupted(why) = signals.wait(control.as_fd(), keyboard)? {
            return Ok(End::Interrupted(why));
        }
        match packet::receive(control.as_fd(), MsgFlags::empty())? {
            Some(VmmEvent::Running) => {}
            Some(VmmEvent::Ended { how }) => {
                process.wait()?;
                return Ok(End::Guest(how));
            }
            Some(VmmEvent::Failed { message }) => {
                process.wait()?;
                bail!(message)
            }
            None => bail!("machine process {}", describe(process.wait()?)),
        }
    }
}
