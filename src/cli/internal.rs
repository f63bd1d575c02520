//! The hidden verbs: each is a process of a sandbox that reads its configuration from an inherited
//! file descriptor and then runs until its work is done.

use std::fs::File;
use std::io::BufReader;
use std::os::fd::{FromRawFd, RawFd};
use std::process::ExitCode;

use anyhow::{Context, bail};
use kiln_vmm::config::{DevicesConfig, FsConfig, VmmConfig};
use kiln_vmm::emulated::devices;
use serde::de::DeserializeOwned;

use crate::cgroup::{self, VictimConfig};
use crate::sandbox::{self, MonitorConfig, ProxyConfig};

/// Options of every hidden verb.
#[derive(Debug, clap::Args)]
pub struct Internal {
    /// The descriptor to read the configuration from
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(RawFd).range(3..))]
    config_fd: RawFd,
}

impl Internal {
    fn read<T: DeserializeOwned>(self) -> anyhow::Result<T> {
        if nix::fcntl::fcntl(
            // SAFETY: only asks whether the descriptor is open.
            unsafe { std::os::fd::BorrowedFd::borrow_raw(self.config_fd) },
            nix::fcntl::FcntlArg::F_GETFD,
        )
        .is_err()
        {
            bail!("file descriptor {} of --config-fd is not open", self.config_fd);
        }
        // SAFETY: the process that started this one handed the descriptor over for this purpose.
        let file = unsafe { File::from_raw_fd(self.config_fd) };
        serde_json::from_reader(BufReader::new(file))
            .with_context(|| format!("configuration on file descriptor {}", self.config_fd))
    }
}

/// `kiln monitor`.
pub fn monitor(config: Internal) -> anyhow::Result<ExitCode> {
    let config: MonitorConfig = config.read()?;
    rename(c"kiln-monitor");
    // SAFETY: the command that started this process handed the descriptors over.
    unsafe { sandbox::run(config) }
}

/// `kiln exec-proxy`.
pub fn exec_proxy(config: Internal) -> anyhow::Result<ExitCode> {
    let config: ProxyConfig = config.read()?;
    rename(c"kiln-exec");
    // SAFETY: the command that started this process handed the descriptors over.
    unsafe { sandbox::run_proxy(config) }
}

/// `kiln oom-victim`.
pub fn oom_victim(config: Internal) -> anyhow::Result<ExitCode> {
    let config: VictimConfig = config.read()?;
    rename(c"kiln-victim");
    // SAFETY: the monitor handed the descriptor over.
    unsafe { cgroup::run_victim(config)? };
    Ok(ExitCode::SUCCESS)
}

/// `kiln vmm`.
pub fn vmm(config: Internal) -> anyhow::Result<ExitCode> {
    let config: VmmConfig = config.read()?;
    rename(c"kiln-vmm");
    kiln_vmm::kvm::run(config)?;
    Ok(ExitCode::SUCCESS)
}

/// `kiln devices`.
pub fn devices(config: Internal) -> anyhow::Result<ExitCode> {
    let config: DevicesConfig = config.read()?;
    rename(c"kiln-devices");
    // SAFETY: the monitor handed the descriptors over, and nothing here holds another.
    unsafe { devices::serve(config)? };
    Ok(ExitCode::SUCCESS)
}

/// `kiln fs`.
pub fn fs(config: Internal) -> anyhow::Result<ExitCode> {
    let config: FsConfig = config.read()?;
    rename(c"kiln-fs");
    // SAFETY: the monitor handed the descriptors over.
    unsafe { kiln_vmm::virtio::fs::serve(config)? };
    Ok(ExitCode::SUCCESS)
}

/// Names the process in `ps`: it is started through a link in /proc, whose name says nothing.
fn rename(name: &std::ffi::CStr) {
    // SAFETY: the kernel reads a string that ends with a zero. It can't fail.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}
