//! What can go wrong on the way into a jail.

use std::io;
use std::os::fd::RawFd;

/// Why a process could not be jailed. It must then end: it holds resources it may not use freely.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// The kernel refused a step.
    #[error("can't {step}")]
    Step {
        /// What was being done, in the infinitive.
        step: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Privileges belong to threads, so a process enters its jail before it has a second one.
    #[error("a process with {0} threads can't be jailed: it enters its jail before it starts any")]
    Threads(u64),
    /// A descriptor that the jail is to keep is not there.
    #[error("file descriptor {0} is to be kept in the jail but isn't open")]
    NotOpen(RawFd),
    /// A descriptor is there that the jail does not know of.
    #[error("file descriptor {fd} ({target}) is open but not on the jail's list")]
    Unlisted {
        /// Its number.
        fd: RawFd,
        /// What it refers to.
        target: String,
    },
    /// The identity is root's.
    #[error("a jailed process can't have uid {uid} and gid {gid}: neither may be 0")]
    Root {
        /// User id asked for.
        uid: u32,
        /// Group id asked for.
        gid: u32,
    },
    /// Someone without privileges can only stay who they are.
    #[error(
        "uid {uid} and gid {gid} can't be taken on by uid {own_uid} and gid {own_gid} without \
         CAP_SETUID and CAP_SETGID: give the process its own ids, or start kiln as root"
    )]
    ForeignIdentity {
        /// User id asked for.
        uid: u32,
        /// Group id asked for.
        gid: u32,
        /// User id of the process.
        own_uid: u32,
        /// Group id of the process.
        own_gid: u32,
    },
    /// The process that started this one has ended.
    #[error("the process that started this one has ended")]
    ParentGone,
    /// A path that a foreign program is to see can't be made part of its root.
    #[error("path {0} can't be shown to a jailed program: it must be absolute and without `..`")]
    Path(std::path::PathBuf),
    /// The seccomp filter does not compile.
    #[error("the seccomp filter does not compile")]
    Filter(#[source] seccompiler::BackendError),
    /// The seccomp filter does not load.
    #[error("can't load the seccomp filter")]
    Load(#[source] seccompiler::Error),
}

/// Adds the step's name to an operating system error.
pub(super) trait During<T> {
    /// Names what was being done, in the infinitive.
    fn during(self, step: &'static str) -> Result<T, JailError>;
}

impl<T, E: Into<io::Error>> During<T> for Result<T, E> {
    fn during(self, step: &'static str) -> Result<T, JailError> {
        self.map_err(|error| JailError::Step { step, source: error.into() })
    }
}

/// Turns the result of a raw system call into a `Result`.
pub(super) fn checked(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
