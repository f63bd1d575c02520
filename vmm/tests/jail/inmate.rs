//! The jailed process: enters a jail and does what it was started for.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitCode, Stdio};

use kiln_vmm::config::{FileLimits, FsConfig, InheritedFd, JailConfig, SharedTree};
use kiln_vmm::jail::foreign::Foreign;
use kiln_vmm::jail::{Jail, sandbox_limits};
use kiln_vmm::virtio::fs;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

use crate::attacks;
use crate::place::{self, Place};
use crate::threads;

/// First argument of a process that is to be jailed.
pub const FLAG: &str = "--inmate";
/// Where it finds its control socket.
pub const CONTROL: RawFd = 3;
/// A descriptor that it keeps.
pub const KEPT: RawFd = 4;
/// A descriptor that it inherits and doesn't list.
pub const LEAKED: RawFd = 50;

/// What an inmate exits with after an attack that the kernel let pass.
pub const SUCCEEDED: u8 = 10;
/// And after one that failed with an error.
pub const REFUSED: u8 = 11;
/// When it could not even enter its jail.
const NOT_JAILED: u8 = 12;

/// The components that are replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Component {
    Vmm,
    Devices,
    /// A command that runs a machine itself.
    Command,
    Fs,
    Qemu,
}

impl Component {
    pub const ALL: [Self; 5] = [Self::Vmm, Self::Devices, Self::Command, Self::Fs, Self::Qemu];

    /// Those that have no capability, whoever starts them.
    pub const UNPRIVILEGED: [Self; 3] = [Self::Vmm, Self::Devices, Self::Command];

    pub fn name(self) -> &'static str {
        match self {
            Self::Vmm => "vmm",
            Self::Devices => "devices",
            Self::Command => "command",
            Self::Fs => "fs",
            Self::Qemu => "qemu",
        }
    }

    /// What its jail calls it.
    pub fn role(self) -> &'static str {
        match self {
            Self::Vmm | Self::Command => "vmm",
            Self::Devices => "devices",
            Self::Fs => "fs",
            Self::Qemu => "qemu",
        }
    }
}

/// How a process in a jail is started.
pub struct Cell<'a> {
    pub component: Component,
    pub identity: JailConfig,
    /// Whether the seccomp filter is part of the jail.
    pub seccomp: bool,
    /// What it does there: `idle`, `pair` (stays outside and starts an idle one), or an attack.
    pub task: &'a str,
    /// The user it is started as.
    pub started_as: Option<u32>,
}

/// A started process and the other end of its control socket.
pub struct Inmate {
    pub child: Child,
    pub control: OwnedFd,
    _place: Place,
}

impl Cell<'_> {
    pub fn start(&self) -> Inmate {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
                .unwrap();
        let place = Place::new();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .arg(FLAG)
            .args([self.component.name(), &self.identity.uid.to_string()])
            .args([&self.identity.gid.to_string(), &self.seccomp.to_string(), self.task])
            .env_clear()
            .envs(place.environment())
            .env("COMPONENT", self.component.name())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        if let Some(user) = self.started_as {
            command.uid(user).gid(user);
        }
        let source = theirs.as_raw_fd();
        // SAFETY: only system calls between fork and exec.
        unsafe {
            command.pre_exec(move || {
                // The control socket might itself have one of the low numbers.
                let high = libc::fcntl(source, libc::F_DUPFD, 100);
                for fd in [CONTROL, KEPT, LEAKED] {
                    if libc::dup2(high, fd) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                Ok(())
            });
        }
        if self.component == Component::Qemu {
            let program = std::env::current_exe().unwrap();
            let jail = Foreign::for_program(self.identity, sandbox_limits(), &program).unwrap();
            // SAFETY: a planned jail makes system calls only.
            unsafe { command.pre_exec(move || jail.enter()) };
        }
        Inmate { child: command.spawn().unwrap(), control: ours, _place: place }
    }
}

/// The inmate's `main`.
pub fn main(arguments: &[String]) -> ExitCode {
    let [component, uid, gid, seccomp, task] = arguments else {
        return ExitCode::from(NOT_JAILED);
    };
    let identity = JailConfig { uid: uid.parse().unwrap(), gid: gid.parse().unwrap() };
    if task == "pair" {
        return stay_outside(arguments);
    }
    // SAFETY: the parent put it there, and it stays open.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL) };
    let component = Component::ALL.into_iter().find(|known| known.name() == component).unwrap();
    if let Err(error) = enter(component, identity, control, seccomp == "true") {
        let source = error.source().map(ToString::to_string);
        eprintln!("{error}: {source:?}");
        return ExitCode::from(NOT_JAILED);
    }
    if task == "idle" {
        return idle(control);
    }
    match threads::attempt(task).unwrap_or_else(|| attacks::attempt(task)) {
        Ok(()) => ExitCode::from(SUCCEEDED),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(REFUSED)
        }
    }
}

fn enter(
    component: Component,
    identity: JailConfig,
    control: BorrowedFd<'_>,
    seccomp: bool,
) -> Result<(), Box<dyn Error>> {
    let kept = [2, KEPT];
    let jail = match component {
        Component::Vmm => Jail::vmm(identity, Some(control), &kept),
        Component::Devices => Jail::devices(identity, control, &kept),
        // It has no control socket; the one of these tests is a descriptor like any other to it.
        Component::Command => Jail::vmm(identity, None, &[2, KEPT, CONTROL]),
        Component::Fs => return enter_share(seccomp),
        // It was put there before it was executed.
        Component::Qemu => return Ok(()),
    };
    Ok(if seccomp { jail.enter() } else { jail.confine() }?)
}

/// Takes the place of `kiln fs`, whose listening socket is [`KEPT`].
fn enter_share(seccomp: bool) -> Result<(), Box<dyn Error>> {
    let share = File::options().read(true).custom_flags(libc::O_PATH).open(place::share())?;
    let config = FsConfig {
        id: "test".to_owned(),
        socket: InheritedFd(KEPT),
        rootfs: SharedTree { source: InheritedFd(share.into_raw_fd()), read_only: false },
        mounts: Vec::new(),
        limits: FileLimits::default(),
        control: InheritedFd(CONTROL),
    };
    // SAFETY: the parent put both there, and nothing here owns them or the share.
    let confined = unsafe { fs::confine(config) }?;
    if seccomp {
        fs::restrict_system_calls(confined.control.as_fd())?;
    }
    // What it serves with stays open.
    std::mem::forget(confined);
    Ok(())
}

/// Says that it is jailed and waits until the other end of the control socket closes.
fn idle(control: BorrowedFd<'_>) -> ExitCode {
    if nix::unistd::write(control, b"jailed").is_err() {
        return ExitCode::FAILURE;
    }
    let mut byte = [0];
    let _ = nix::unistd::read(control, &mut byte);
    ExitCode::SUCCESS
}

/// Starts an idle inmate on the same control socket, says which process it is, and waits for it.
fn stay_outside(arguments: &[String]) -> ExitCode {
    let [component, uid, gid, seccomp, _] = arguments else {
        return ExitCode::from(NOT_JAILED);
    };
    let mut child = Command::new("/proc/self/exe")
        .arg(FLAG)
        .args([component, uid, gid, seccomp, "idle"])
        .spawn()
        .unwrap();
    // SAFETY: the parent put it there, and it stays open.
    let control = unsafe { BorrowedFd::borrow_raw(CONTROL) };
    nix::unistd::write(control, child.id().to_string().as_bytes()).unwrap();
    child.wait().unwrap();
    ExitCode::SUCCESS
}
