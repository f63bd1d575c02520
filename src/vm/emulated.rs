//! A machine of the emulated engine: QEMU, and `kiln devices` if there are disks.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, bail};
use kiln_vmm::config::{DevicesConfig, DiskConfig, DiskLimits, JailConfig};
use kiln_vmm::emulated::qemu;

use super::console::{Console, show};
use super::wait::{First, Signals};
use super::{Disk, End, Machine};
use crate::mend;
use crate::process::{Launch, Process, describe};
use crate::sandbox::machine::{find_program, readable_by_all, spawn_qemu};
use crate::sandbox::packet;
use crate::sandbox::tail::{self, Tail};
use crate::state::StateDir;

/// What running a machine takes besides it.
#[derive(Debug)]
pub struct Host<'a> {
    /// QEMU's executable.
    pub qemu: &'a Path,
    /// Where state is kept.
    pub root: &'a Path,
    /// Who the processes become.
    pub jail: JailConfig,
    /// How they log.
    pub options: &'a [OsString],
}

/// Runs a machine to its end.
///
/// # Errors
/// The machine can't be made, or one of its processes failed.
pub fn run(machine: Machine, host: &Host<'_>) -> anyhow::Result<End> {
    let program = find_program(host.qemu)?;
    let signals = Signals::block()?;
    let console = Console::on_terminal().context("terminal")?;
    let cmdline = machine.cmdline("t");
    let (_devices, sockets) =
        serve_disks(machine.disks, machine.disk_limits, host).context("device process")?;

    let mut launch = Launch::program(&program);
    let kernel = readable_by_all(machine.kernel).context("--kernel")?;
    let initrd = machine.initrd.map(readable_by_all).transpose().context("--initrd")?;
    let qemu = qemu::Machine {
        memory_mib: machine.memory_mib,
        cpus: machine.cpus,
        kernel: launch.give(kernel),
        initrd: initrd.map(|initrd| launch.give(initrd)),
        cmdline,
        devices: sockets
            .into_iter()
            .map(|socket| qemu::Device::Block { socket: launch.give(socket) })
            .collect(),
        foreign_kernel: true,
    };
    // QEMU makes its standard streams non-blocking, which the caller's must not become.
    let input = match &console {
        Some(console) => Stdio::from(console.input.try_clone()?),
        None => relay_input().context("thread for standard input")?,
    };
    let (output, their_output) = io::pipe()?;
    let (errors, their_errors) = io::pipe()?;
    launch.args(qemu.arguments());
    launch.stdio(input, their_output.into(), their_errors.into());
    let mut process = spawn_qemu(launch, &program, host.jail)?;
    let shown = show(output)?;
    let errors = std::thread::spawn(move || collect(errors));
    let keyboard = console.as_ref().map(|console| console.ended.as_fd());
    if let First::Interrupted(why) = signals.wait(process.pidfd(), keyboard)? {
        return Ok(End::Interrupted(why));
    }
    let status = process.wait()?;
    // Both end with QEMU, whose ends of the pipes are gone.
    let _ = shown.join();
    let errors = errors.join().unwrap_or_default();
    match qemu::end(status.code(), &errors.text()) {
        Some(how) => Ok(End::Guest(how)),
        None => {
            let text = errors.text();
            let messages: Vec<_> = qemu::messages(&text).map(tail::printable).collect();
            let said = if messages.is_empty() { errors.lines() } else { messages };
            let said = format!("QEMU {}\n  {}", describe(status), said.join("\n  "));
            match mend::of(&said) {
                Some(mend) => bail!(mend::extend_first_line(&said, &format!(": {mend}"))),
                None => bail!(said),
            }
        }
    }
}

/// Copies standard input into a pipe.
fn relay_input() -> io::Result<Stdio> {
    let (input, mut writer) = io::pipe()?;
    std::thread::Builder::new().name("kiln-stdin".to_owned()).spawn(move || {
        // Ends with its input or with its reader; nobody waits for it.
        let _ = io::copy(&mut io::stdin(), &mut writer);
    })?;
    Ok(input.into())
}

/// The end of what QEMU says.
fn collect(mut errors: io::PipeReader) -> Tail {
    let mut tail = Tail::default();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = errors.read(&mut buffer) {
        tail.push(&buffer[..length]);
    }
    tail
}

/// A device process for the disks, with a connection for each.
fn serve_disks(
    disks: Vec<Disk>,
    limits: DiskLimits,
    host: &Host<'_>,
) -> anyhow::Result<(Option<Devices>, Vec<UnixStream>)> {
    if disks.is_empty() {
        return Ok((None, Vec::new()));
    }
    let id = format!("vm-{}", std::process::id());
    let (control, their_control) = packet::pair()?;
    let mut launch = Launch::verb("devices", host.options);
    let state = StateDir::create(host.root, &id)?;
    let sockets: io::Result<Vec<_>> = disks.iter().map(|_| state.private_socket()).collect();
    state.remove()?;
    let mut connections = Vec::new();
    let mut served = Vec::new();
    for (disk, (listener, connection)) in disks.into_iter().zip(sockets?) {
        let (file, read_only) = (launch.give(disk.file), disk.read_only);
        let config = DiskConfig { file, read_only, limits };
        served.push((config, launch.give(listener)));
        connections.push(connection);
    }
    let config = DevicesConfig {
        id,
        vsock: None,
        disks: served,
        nets: Vec::new(),
        jail: host.jail,
        control: launch.give(their_control),
    };
    launch.configure(&config)?;
    launch.stdio(Stdio::null(), Stdio::null(), Stdio::inherit());
    launch.alone();
    let devices = Devices { _process: launch.spawn()?, _control: control };
    Ok((Some(devices), connections))
}

/// The device process; it ends when this is dropped.
#[derive(Debug)]
struct Devices {
    _process: Process,
    _control: std::os::fd::OwnedFd,
}
