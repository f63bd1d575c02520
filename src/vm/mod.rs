//! Machines without containers: a kernel of the user's own, its console on standard input and output.
//!
//! The command supervises the machine's process by itself; there is no monitor, no agent and no
//! share. Under kvm that is one process, and with no terminal to translate it has the command's own
//! standard streams: a short guest's whole time is little more than what KVM takes.
//!
//! # Shape
//! * [`kvm`] and [`emulated`]: one engine each.
//! * [`console`]: the terminal, and what ends a guest from the keyboard.
//! * [`wait`]: for the guest's end, or a reason to end it.

mod console;
pub mod emulated;
pub mod kvm;
mod wait;

use std::fs::File;
use std::path::PathBuf;

use anyhow::Context;
use kiln_vmm::config::{ConsoleKind, DiskLimits, GuestEnd};

pub use wait::Interrupted;

/// A machine to run.
#[derive(Debug)]
pub struct Machine {
    /// The kernel.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The kernel's command line; without one the console is named, and what a panic does.
    pub cmdline: Option<String>,
    /// Memory in MiB.
    pub memory_mib: u64,
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// Disks, in the order the guest finds them.
    pub disks: Vec<Disk>,
    /// How fast each of them is at most.
    pub disk_limits: DiskLimits,
    /// The device that is the console.
    pub console: ConsoleKind,
}

/// A disk image, opened.
#[derive(Debug)]
pub struct Disk {
    /// The image.
    pub file: File,
    /// The guest may not write.
    pub read_only: bool,
}

impl Disk {
    /// Opens what `FILE[:ro]` names.
    ///
    /// # Errors
    /// The file, named.
    pub fn open(named: &str) -> anyhow::Result<Self> {
        let (path, read_only) = match named.strip_suffix(":ro") {
            Some(path) => (path, true),
            None => (named, false),
        };
        let path = PathBuf::from(path);
        let file = File::options().read(true).write(!read_only).open(&path);
        let file = file.with_context(|| format!("--disk: {}", path.display()))?;
        Ok(Self { file, read_only })
    }
}

impl Machine {
    /// The command line that the kernel gets; `reboot` is how guests of the engine restart.
    fn cmdline(&self, reboot: &str) -> String {
        let console = match self.console {
            ConsoleKind::Serial => "ttyS0",
            ConsoleKind::Virtio => "hvc0",
        };
        self.cmdline
            .clone()
            .unwrap_or_else(|| format!("console={console} panic=-1 reboot={reboot}"))
    }
}

/// How a machine's run ended.
#[derive(Debug)]
pub enum End {
    /// By itself.
    Guest(GuestEnd),
    /// From outside.
    Interrupted(Interrupted),
}
