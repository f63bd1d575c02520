//! Hooks that run in the container's namespaces: `createContainer`, `startContainer`.
//!
//! Each gets the container's state as JSON on standard input, the arguments and the environment that
//! its entry has and nothing else, and as much time as that gives it; then its process group is
//! killed. What it writes is part of the error. They run one after the other, and the first that fails
//! ends the create or the start.
//!
//! # `createContainer`
//! Runs once the namespaces and the mounts are made, before the root is changed, as root of the
//! container's user namespace. The specification looks its path up among the runtime's files. Those
//! are the host's, which no guest has, and the agent's own are none that a bundle could mean. So the
//! hook's root, and where its path is looked up, is the container's root file system with its mounts:
//! what is there runs; what only the host has is refused by name.
//!
//! # `startContainer`
//! Runs as part of the start, before the program is executed, and as that would be: from the
//! container's files, with the process's user, capabilities, limits, directory and seccomp filter.

use std::convert::Infallible;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use kiln_protocol::FailurePhase;
use oci_spec::runtime::{Hook, Hooks as HooksOfSpec};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, kill_process_group, pidfd_open, waitpid,
};
use serde_json::{Map, Value};

use super::launch::clone_process;
use super::program::{self, check};
use crate::failure::{During, Failure};
use crate::process::executable;

/// As much of a hook's output as an error shows, in bytes: the last.
const SHOWN: u64 = 2048;

/// The hooks of a container, and the state that they get.
#[derive(Debug, Clone)]
pub struct Hooks {
    create: Vec<HookPlan>,
    start: Vec<HookPlan>,
    state: Map<String, Value>,
}

#[derive(Debug, Clone)]
struct HookPlan {
    field: String,
    path: PathBuf,
    args: Vec<String>,
    env: Vec<String>,
    timeout: Option<Duration>,
}

impl Hooks {
    /// Reads `hooks`. `state` is the container's state as JSON, but for what is the hook's moment's.
    ///
    /// # Errors
    /// A hook that can't be run, by field.
    pub fn from_spec(hooks: Option<&HooksOfSpec>, state: &str) -> Result<Self, Failure> {
        let read = |name: &str, list: Option<&Option<Vec<Hook>>>| {
            let list = list.into_iter().flatten().flatten().enumerate();
            list.map(|(index, hook)| HookPlan::from_spec(format!("hooks.{name}[{index}]"), hook))
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            create: read("createContainer", hooks.map(HooksOfSpec::create_container))?,
            start: read("startContainer", hooks.map(HooksOfSpec::start_container))?,
            state: serde_json::from_str(state)
                .during(FailurePhase::Config, || "the container's state")?,
        })
    }

    /// Runs the `createContainer` hooks. `root` is the container's root file system, complete.
    ///
    /// # Errors
    /// The first hook that isn't there, fails or takes too long, by field.
    pub fn create(&self, root: BorrowedFd<'_>) -> Result<(), Failure> {
        for hook in &self.create {
            kiln_rooted::lookup(root, &hook.path).map_err(|error| {
                let why = "in the container's root file system, and files of the host are not in \
                           the guest";
                hook.failure(&format!("is not there ({error}) {why}"), "")
            })?;
            hook.run(&self.state_now("creating"), || {
                rustix::process::fchdir(root)?;
                Ok(rustix::process::chroot(c".")?)
            })?;
        }
        Ok(())
    }

    /// Runs the `startContainer` hooks. `confine` does to each what is done to the program at last.
    ///
    /// # Errors
    /// As [`Self::create`].
    pub fn start(&self, confine: impl Fn() -> io::Result<()>) -> Result<(), Failure> {
        self.start.iter().try_for_each(|hook| hook.run(&self.state_now("created"), &confine))
    }

    fn state_now(&self, status: &str) -> Value {
        let mut state = self.state.clone();
        state.insert("status".to_owned(), status.into());
        // In the container's PID namespace, as hooks there can use it.
        state.insert("pid".to_owned(), std::process::id().into());
        state.into()
    }
}

impl HookPlan {
    fn from_spec(field: String, hook: &Hook) -> Result<Self, Failure> {
        let refuse = |name: &str, why: String| {
            Err(Failure::new(FailurePhase::Config, format!("{field}.{name}: {why}")))
        };
        let path = hook.path().clone();
        if !path.is_absolute() {
            return refuse("path", format!("{path:?} is not an absolute path"));
        }
        let timeout = match hook.timeout().map(u64::try_from) {
            None => None,
            Some(Ok(seconds @ 1..)) => Some(Duration::from_secs(seconds)),
            Some(_) => return refuse("timeout", "must be more than 0 seconds".to_owned()),
        };
        let env = hook.env().clone().unwrap_or_default();
        let named = |variable: &&String| variable.find('=').is_some_and(|at| at > 0);
        if let Some(variable) = env.iter().find(|variable| !named(variable)) {
            return refuse("env", format!("{variable:?} is not of the form NAME=VALUE"));
        }
        let mut args = hook.args().clone().unwrap_or_default();
        if args.is_empty() {
            args.push(path.to_string_lossy().into_owned());
        }
        if args.iter().chain(&env).any(|text| text.contains('\0')) {
            return refuse("args", "contains a null byte".to_owned());
        }
        Ok(Self { field, path, args, env, timeout })
    }

    fn failure(&self, cause: &str, output: &str) -> Failure {
        let said = match output.trim() {
            "" => String::new(),
            text => format!("; its output ends with: {text}"),
        };
        let Self { field, path, .. } = self;
        Failure::new(FailurePhase::Hooks, format!("{field}: {}: {cause}{said}", path.display()))
    }

    /// Runs the hook to its end. It calls `enter` right before it executes its program.
    fn run(&self, state: &Value, enter: impl Fn() -> io::Result<()>) -> Result<(), Failure> {
        let mut output = None;
        let ended = self.execute(state, enter, &mut output);
        ended.map_err(|error| {
            self.failure(&error.to_string(), &output.map(last).unwrap_or_default())
        })
    }

    /// `output` becomes the file that the hook writes to.
    fn execute(
        &self,
        state: &Value,
        enter: impl Fn() -> io::Result<()>,
        output: &mut Option<File>,
    ) -> io::Result<()> {
        let mut input = memory_file()?;
        input.write_all(&serde_json::to_vec(state)?)?;
        input.rewind()?;
        let output = output.insert(memory_file()?);
        let hook = self.spawn(&input, output, enter)?;
        if !ends_within(hook, self.timeout)? {
            // One that has ended since is as well.
            let _ = kill_process_group(hook, Signal::KILL);
            wait(hook)?;
            let seconds = self.timeout.unwrap_or_default().as_secs();
            return Err(io::Error::other(format!("did not end within its timeout of {seconds} s")));
        }
        let status = wait(hook)?;
        if status.success() { Ok(()) } else { Err(io::Error::other(status.to_string())) }
    }

    fn spawn(
        &self,
        input: &File,
        output: &File,
        enter: impl Fn() -> io::Result<()>,
    ) -> io::Result<Pid> {
        // SAFETY: the process has one thread; the child doesn't return.
        let pid = unsafe { clone_process(0, libc::SIGCHLD) }?;
        if let Some(pid) = Pid::from_raw(pid) {
            return Ok(pid);
        }
        let Err(error) = self.become_hook(input, output, enter);
        let failure = match error.raw_os_error() {
            Some(_) => executable::exec_failure(&self.path, error),
            None => Failure::new(FailurePhase::Hooks, error.to_string()),
        };
        let mut output = output;
        // Where that can't be written, the status says enough.
        let _ = writeln!(output, "{failure}");
        program::end(failure.exit_code)
    }

    fn become_hook(
        &self,
        input: &File,
        output: &File,
        enter: impl Fn() -> io::Result<()>,
    ) -> io::Result<Infallible> {
        rustix::process::setpgid(None, None)?;
        for (file, target) in [(input, 0), (output, 1), (output, 2)] {
            program::duplicate(file, target)?;
        }
        // Nothing of the agent's reaches a hook, whatever opened it.
        // SAFETY: marks descriptors, which work on until execve(2).
        check(unsafe {
            libc::close_range(3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as i32)
        })?;
        let (path, args) = (program::c_string(&self.path)?, program::c_strings(&self.args)?);
        let env = program::c_strings(&self.env)?;
        enter()?;
        Ok(nix::unistd::execve(&path, &args, &env)?)
    }
}

/// Waits for a process's end.
fn ends_within(process: Pid, limit: Option<Duration>) -> io::Result<bool> {
    let process = pidfd_open(process, PidfdFlags::empty())?;
    let deadline = limit.and_then(|limit| Instant::now().checked_add(limit));
    loop {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let timeout = left.map(Timespec::try_from).transpose().map_err(io::Error::other)?;
        let mut polled = [PollFd::from_borrowed_fd(process.as_fd(), PollFlags::IN)];
        match poll(&mut polled, timeout.as_ref()) {
            Ok(0) if left == Some(Duration::ZERO) => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait(process: Pid) -> io::Result<ExitStatus> {
    let waited = rustix::io::retry_on_intr(|| waitpid(Some(process), WaitOptions::empty()))?;
    let (_, status) = waited.ok_or(io::ErrorKind::NotFound)?;
    Ok(ExitStatus::from_raw(status.as_raw()))
}

fn memory_file() -> io::Result<File> {
    Ok(rustix::fs::memfd_create("kiln-hook", MemfdFlags::CLOEXEC)?.into())
}

/// The end of a file as text.
fn last(mut file: File) -> String {
    let mut bytes = Vec::new();
    let length = file.metadata().map_or(0, |metadata| metadata.len());
    if file.seek(SeekFrom::Start(length.saturating_sub(SHOWN))).is_ok() {
        // What can't be read isn't shown.
        let _ = file.take(SHOWN).read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
