//! Processes of a sandbox: started with exactly the descriptors that they are told of, and ended
//! with the one that started them.
//!
//! A [`Launch`] is given descriptors, which the process finds under the same numbers, and one JSON
//! configuration that names them. Everything else is closed on exec. The process is in a process
//! group of its own, so that signals of the caller's terminal don't reach it; the kernel kills it
//! when the thread that started it ends; and dropping the [`Process`] kills and reaps it.
//!
//! A process that reads what a guest wrote is [alone](Launch::alone): as far as it can name processes,
//! there are no others.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};

use kiln_vmm::config::InheritedFd;
use kiln_vmm::jail::namespaces;
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Serialize;

/// Marks every descriptor but standard input, output and error to be closed on exec: whatever the
/// caller leaked into this process goes no further.
pub fn keep_descriptors_to_oneself() {
    // SAFETY: only sets a flag on descriptors. A kernel without the call leaves things as they are.
    unsafe { libc::close_range(3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC as i32) };
}

/// A process that is about to be started.
#[derive(Debug)]
pub struct Launch {
    command: Command,
    given: Vec<OwnedFd>,
    outlives_starter: bool,
    alone: bool,
}

impl Launch {
    /// One of kiln's own processes, by its hidden verb; `options` stand before it.
    pub fn verb(verb: &str, options: &[OsString]) -> Self {
        let mut launch = Self::program("/proc/self/exe");
        launch.command.arg0("kiln").args(options).arg(verb);
        launch
    }

    /// A process that stands for one in a guest, by its hidden verb: it has this process's standard
    /// streams and process group, so that it may read from the terminal, and minds its starter's
    /// end by itself. `options` stand before the verb.
    pub fn stand_in(verb: &str, options: &[OsString]) -> Self {
        let mut launch = Self::verb(verb, options);
        launch.command.stdin(Stdio::inherit()).stdout(Stdio::inherit()).stderr(Stdio::inherit());
        launch.outlives_starter = true;
        launch
    }

    /// Has the process lead a session of its own, so that neither signals of the caller's terminal
    /// nor its hang-up reach it. `terminal` becomes the session's, and the process's standard
    /// input and output.
    ///
    /// # Errors
    /// No descriptors are left.
    pub fn lead_session(&mut self, terminal: Option<OwnedFd>) -> io::Result<&mut Self> {
        if let Some(terminal) = &terminal {
            let second = || terminal.try_clone().map(Stdio::from);
            self.command.stdin(second()?).stdout(second()?).stderr(Stdio::null());
        }
        let has_terminal = terminal.is_some();
        let lead = move || {
            // SAFETY: no arguments. Fails only for the leader of a process group, which a process
            // that has just been forked isn't.
            checked(unsafe { libc::setsid() })?;
            if has_terminal {
                // SAFETY: standard input is open; the argument is a plain number.
                checked(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
            }
            Ok(())
        };
        // SAFETY: only system calls are made between fork and exec.
        unsafe { self.command.pre_exec(lead) };
        Ok(self)
    }

    /// Another program.
    pub fn program(path: impl AsRef<OsStr>) -> Self {
        let mut command = Command::new(path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { command, given: Vec::new(), outlives_starter: false, alone: false }
    }

    /// Appends arguments.
    pub fn args(&mut self, args: impl IntoIterator<Item = impl Into<OsString>>) -> &mut Self {
        self.command.args(args.into_iter().map(Into::into));
        self
    }

    /// The name by which the process is called: its first argument, which is the program's path
    /// otherwise.
    pub fn called(&mut self, name: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg0(name);
        self
    }

    /// Gives the process this environment, instead of the caller's.
    pub fn environment<'a>(
        &mut self,
        variables: impl IntoIterator<Item = (&'a str, &'a str)>,
    ) -> &mut Self {
        self.command.env_clear().envs(variables);
        self
    }

    /// Gives the process a pid namespace of its own, if this one may make any: that takes
    /// `CAP_SYS_ADMIN`.
    pub fn alone(&mut self) -> &mut Self {
        self.alone = may_make_namespaces();
        self
    }

    /// Where the process begins, instead of where the caller is.
    pub fn directory(&mut self, path: impl AsRef<Path>) -> &mut Self {
        self.command.current_dir(path);
        self
    }

    /// Hands a descriptor over; the process finds it under the number that this returns.
    pub fn give(&mut self, fd: impl Into<OwnedFd>) -> InheritedFd {
        let fd = fd.into();
        let number = InheritedFd(fd.as_raw_fd());
        self.given.push(fd);
        number
    }

    /// Gives the process its configuration, with the option that names it.
    ///
    /// # Errors
    /// No memory for it.
    pub fn configure(&mut self, config: &impl Serialize) -> io::Result<&mut Self> {
        let mut file = memory_file("kiln-config")?;
        file.write_all(&serde_json::to_vec(config)?)?;
        file.rewind()?;
        let number = self.give(file);
        self.command.arg("--config-fd").arg(number.0.to_string());
        Ok(self)
    }

    /// What the process's standard input, output and error are; without this, `/dev/null`.
    pub fn stdio(&mut self, stdin: Stdio, stdout: Stdio, stderr: Stdio) -> &mut Self {
        self.command.stdin(stdin).stdout(stdout).stderr(stderr);
        self
    }

    /// Starts the process.
    ///
    /// # Errors
    /// As [`Command::spawn`].
    pub fn spawn(self) -> io::Result<Process> {
        self.spawn_with(|| Ok(()))
    }

    /// Starts the process; `prepare` runs in it just before the program is executed.
    ///
    /// # Errors
    /// As [`Command::spawn`], or what `prepare` fails with.
    pub fn spawn_with(
        mut self,
        mut prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static,
    ) -> io::Result<Process> {
        let numbers: Vec<RawFd> = self.given.iter().map(AsRawFd::as_raw_fd).collect();
        let starter = pidfd_of(std::process::id())?;
        let outlives_starter = self.outlives_starter;
        if !outlives_starter {
            self.command.process_group(0);
        }
        let before_exec = move || {
            for &number in &numbers {
                // SAFETY: `given` keeps the descriptor open until after the fork.
                checked(unsafe { libc::fcntl(number, libc::F_SETFD, 0) })?;
            }
            prepare()?;
            if outlives_starter {
                return Ok(());
            }
            // SAFETY: plain numbers.
            checked(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })?;
            // `getppid` can't tell: in a pid namespace of its own a process has parent 0.
            let mut ended =
                libc::pollfd { fd: starter.as_raw_fd(), events: libc::POLLIN, revents: 0 };
            // SAFETY: the array has one element.
            if checked(unsafe { libc::poll(&raw mut ended, 1, 0) })? != 0 {
                return Err(io::Error::from_raw_os_error(libc::ESRCH));
            }
            Ok(())
        };
        // SAFETY: between fork and exec of a process that may have threads only system calls are
        // made; `prepare` is one of this crate's and keeps to that too.
        unsafe { self.command.pre_exec(before_exec) };
        let child = match self.alone {
            true => namespaces::with_pid_namespace(|| self.command.spawn())?,
            false => self.command.spawn()?,
        };
        Process::new(child)
    }
}

fn checked(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn may_make_namespaces() -> bool {
    capctl::CapState::get_current().is_ok_and(|state| state.effective.has(capctl::Cap::SYS_ADMIN))
}

/// A descriptor of a process that isn't reaped.
fn pidfd_of(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made the descriptor, for nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Writes this process's id so that a reader sees all of it or nothing. Whoever may write to the directory
/// can't have it written elsewhere: a link is replaced, not followed.
///
/// # Errors
/// The file system refuses.
pub fn write_pid(path: &Path) -> io::Result<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(name);
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // O_EXCL, which follows no link either.
    let mut file = File::create_new(&new)?;
    let written = file.write_all(std::process::id().to_string().as_bytes());
    let written = written.and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written
}

/// A file that exists in memory only.
///
/// # Errors
/// The kernel refuses.
pub fn memory_file(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC)?))
}

/// A process that was started and is this one's to end.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pidfd: OwnedFd,
    released: bool,
}

impl Process {
    fn new(mut child: Child) -> io::Result<Self> {
        let pidfd = pidfd_of(child.id()).inspect_err(|_| {
            let _ = child.kill().and_then(|()| child.wait());
        })?;
        Ok(Self { child, pidfd, released: false })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Readable once it has ended.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// Somebody else reaped it.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        self.child.try_wait()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Somebody else reaped it.
    pub fn wait(&mut self) -> io::Result<ExitStatus> {
        self.child.wait()
    }

    /// Kills it.
    pub fn kill(&mut self) {
        // Fails only if it has ended already.
        let _ = self.child.kill();
    }

    /// Kills it and what it has started, as far as that has stayed in its process group.
    pub fn kill_group(&mut self) {
        if let Ok(id) = i32::try_from(self.child.id()) {
            // SAFETY: plain numbers. It isn't reaped, so the group's number is still its own.
            unsafe { libc::kill(-id, libc::SIGKILL) };
        }
    }
}

impl Process {
    /// Lets it go on without this one.
    pub fn release(mut self) {
        self.released = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if self.released {
            return;
        }
        self.kill();
        let _ = self.child.wait();
    }
}

/// How a process ended, in words.
pub fn describe(status: ExitStatus) -> String {
    use std::os::unix::process::ExitStatusExt;

    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exited with status {code}"),
        (None, Some(signal)) => match nix::sys::signal::Signal::try_from(signal) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {signal}"),
        },
        (None, None) => "ended".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn process_gets_what_it_was_given_and_nothing_else() {
        let (mut reader, writer) = std::io::pipe().expect("pipe");
        let (_leaked, also_leaked) = std::io::pipe().expect("pipe");
        let mut launch = Launch::program("/bin/sh");
        let given = launch.give(writer);
        let script = format!(
            "[ -e /proc/self/fd/{} ] && echo leaked >&{given}; echo done >&{given}",
            also_leaked.as_raw_fd(),
            given = given.0
        );
        launch.args(["-c", &script]);
        let mut process = launch.spawn().expect("starts");
        assert!(process.wait().expect("ends").success());
        let mut output = String::new();
        reader.read_to_string(&mut output).expect("reads");
        assert_eq!(output, "done\n");
    }

    #[test]
    fn dropping_kills() {
        let mut launch = Launch::program("/bin/sleep");
        launch.args(["1000"]);
        let process = launch.spawn().expect("starts");
        let pid = process.id();
        drop(process);
        assert!(!std::path::Path::new(&format!("/proc/{pid}")).exists());
    }

    #[test]
    fn pid_file_replaces_links_and_follows_none() {
        let folder = tempfile::tempdir().expect("temporary directory");
        let target = folder.path().join("target");
        std::fs::write(&target, "precious").expect("written");
        let path = folder.path().join("pid");
        for link in [folder.path().join(".pid"), path.clone()] {
            std::os::unix::fs::symlink(&target, link).expect("planted");
        }
        for _ in 0..2 {
            write_pid(&path).expect("written");
            let text = std::fs::read_to_string(&path).expect("readable");
            assert_eq!(text, std::process::id().to_string());
            assert!(std::fs::symlink_metadata(&path).expect("there").is_file());
        }
        assert_eq!(std::fs::read_to_string(&target).expect("readable"), "precious");
        assert_eq!(std::fs::read_dir(folder.path()).expect("readable").count(), 2);
    }
}
