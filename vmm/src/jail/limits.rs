//! Resource limits of a jailed process.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::error::{During, JailError};

/// What a jailed process may use at most. A lower limit that it already has stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Open file descriptors.
    pub descriptors: u64,
    /// Tasks of its user; `None` where the user isn't the sandbox's alone.
    pub threads: Option<u64>,
}

impl Limits {
    /// Sets the limits, hard and soft, and that of core dumps to none.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn set(self) -> Result<(), JailError> {
        lower(Resource::RLIMIT_CORE, 0).during("forbid core dumps")?;
        lower(Resource::RLIMIT_NOFILE, self.descriptors)
            .during("limit the number of file descriptors")?;
        if let Some(threads) = self.threads {
            lower(Resource::RLIMIT_NPROC, threads).during("limit the number of threads")?;
        }
        Ok(())
    }
}

fn lower(resource: Resource, limit: u64) -> nix::Result<()> {
    let (_, hard) = getrlimit(resource)?;
    let limit = limit.min(hard);
    setrlimit(resource, limit, limit)
}
