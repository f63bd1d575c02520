//! `kiln vm run`: boot a kernel of the user's own with its console on standard input and output.

use std::fs::File;
use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use kiln_vmm::config::{ConsoleKind, DiskLimits, GuestEnd};
use kiln_vmm::jail::identity;

use super::{Global, Reported};
use crate::engine;
use crate::limits::{Bytes, Count};
use crate::sandbox::Engine;
use crate::sandbox::machine::open_kvm;
use crate::settings::{EngineChoice, Settings};
use crate::vm::{self, Disk, End, Interrupted, Machine};

/// Options of `kiln vm run`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
The console is on standard input and output; on a terminal, Ctrl-A X ends the guest and Ctrl-A \
Ctrl-A sends one Ctrl-A. The status is 0 when the guest switches the machine off or resets it, 3 \
when it triple-faults, 130 when it was ended from the keyboard, 1 for every failure.")]
pub struct VmRun {
    /// The kernel: an uncompressed x86-64 ELF
    #[arg(long, value_name = "ELF")]
    kernel: PathBuf,
    /// The initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// The kernel's command line [default: the console, panic=-1 and how to reboot]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    cmdline: Option<String>,
    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 512,
          value_parser = clap::value_parser!(u64).range(1..=1 << 24))]
    memory: u64,
    /// CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u8).range(1..=32))]
    cpus: u8,
    /// A raw disk image, read-only with `:ro` appended; may be given several times
    #[arg(long = "disk", value_name = "FILE[:ro]")]
    disks: Vec<String>,
    /// Let the guest read and write no more than this a second on each disk
    #[arg(long, value_name = "BYTES")]
    disk_bandwidth: Option<Bytes>,
    /// Serve no more than this many of the guest's requests a second on each disk
    #[arg(long, value_name = "N")]
    iops: Option<Count>,
    /// What executes the guest's code
    #[arg(long, value_enum)]
    engine: Option<EngineChoice>,
    /// The device that the console is
    #[arg(long, value_enum, default_value = "serial")]
    console: Console,
}

/// The device that a console is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Console {
    /// A 16550A, ttyS0
    Serial,
    /// virtio-console, hvc0; kvm engine only
    Virtio,
}

/// Boots the kernel and waits for the machine's end.
pub fn run(global: &Global, run: VmRun) -> anyhow::Result<ExitCode> {
    let settings = Settings::load(global.config.as_deref())?;
    let machine = Machine {
        kernel: open("--kernel", &run.kernel)?,
        initrd: run.initrd.as_deref().map(|path| open("--initrd", path)).transpose()?,
        cmdline: run.cmdline,
        memory_mib: run.memory,
        cpus: run.cpus,
        disks: run.disks.iter().map(|disk| Disk::open(disk)).collect::<Result<_, _>>()?,
        disk_limits: DiskLimits {
            bytes_per_second: run.disk_bandwidth.map(|bytes| bytes.0),
            requests_per_second: run.iops.map(|count| count.0),
        },
        console: match run.console {
            Console::Serial => ConsoleKind::Serial,
            Console::Virtio => ConsoleKind::Virtio,
        },
    };
    let options = global.for_parts();
    let end = match choose(run.engine.unwrap_or(settings.engine), &settings.qemu)? {
        Engine::Kvm => {
            let host = vm::kvm::Host { kvm: open_kvm()?, jail: identity::allocate()? };
            // A terminal is to be restored, and a log file written to, by a process that may.
            if io::stdin().is_terminal() || global.log.is_some() {
                vm::kvm::run_beside(machine, host, &options)?
            } else {
                vm::kvm::run_here(machine, host)?
            }
        }
        Engine::Emulated => {
            if machine.console == ConsoleKind::Virtio {
                bail!("--console virtio: the emulated engine has a serial console only");
            }
            let host = vm::emulated::Host {
                qemu: &settings.qemu,
                root: &global.root,
                jail: identity::allocate()?,
                options: &options,
            };
            vm::emulated::run(machine, &host)?
        }
    };
    status(end)
}

/// Takes kvm by name without asking what it can do: not every guest is Linux.
fn choose(choice: EngineChoice, qemu: &Path) -> anyhow::Result<Engine> {
    if choice == EngineChoice::Kvm {
        return Ok(Engine::Kvm);
    }
    let choice = engine::choose(choice, qemu)?;
    choice.announce();
    Ok(choice.engine)
}

fn open(option: &str, path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("{option}: {}", path.display()))
}

fn status(end: End) -> anyhow::Result<ExitCode> {
    match end {
        End::Guest(GuestEnd::Shutdown | GuestEnd::Reset) => Ok(ExitCode::SUCCESS),
        End::Guest(GuestEnd::TripleFault) => {
            let error = "the guest triple-faulted".to_owned();
            Err(Reported { exit_code: 3, error }.into())
        }
        End::Guest(GuestEnd::Broken { reason, registers }) => {
            Err(anyhow!("the guest can't be run further: {reason}\n{}", registers.join("\n")))
        }
        End::Interrupted(Interrupted::Keyboard) => {
            let error = "ended from the keyboard".to_owned();
            Err(Reported { exit_code: 130, error }.into())
        }
        End::Interrupted(Interrupted::Signal(signal)) => {
            let exit_code = u8::try_from(128 + signal).unwrap_or(1);
            Err(Reported { exit_code, error: format!("ended by signal {signal}") }.into())
        }
    }
}
