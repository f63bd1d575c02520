//! What a caller must be allowed to do before a container can be run.
//!
//! A container's files are of many owners, the file system process pivots into a tree of its own, and
//! the other processes get a user that no one else has: all of that takes root, or root's capabilities.

use capctl::caps::{Cap, CapState};
use nix::unistd::Uid;

/// Without these no container runs.
const VITAL: [(Cap, &str); 7] = [
    (Cap::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (Cap::SETUID, "CAP_SETUID"),
    (Cap::SETGID, "CAP_SETGID"),
    (Cap::SETPCAP, "CAP_SETPCAP"),
    (Cap::CHOWN, "CAP_CHOWN"),
    (Cap::FOWNER, "CAP_FOWNER"),
    (Cap::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
];

/// Without these some can't have what they ask for: device nodes, networks.
const USEFUL: [(Cap, &str); 2] = [(Cap::MKNOD, "CAP_MKNOD"), (Cap::NET_ADMIN, "CAP_NET_ADMIN")];

/// What the caller lacks.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Lacking {
    /// Capabilities without which no container runs.
    pub vital: Vec<&'static str>,
    /// Capabilities without which some do with less.
    pub useful: Vec<&'static str>,
}

/// Why a container can't be run by this caller.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// The kernel doesn't say.
    #[error("capabilities can't be read")]
    Unknown(#[source] std::io::Error),
    /// Some are missing.
    #[error(
        "containers need root: {who} lacks {}; run kiln as root (sudo), or give it these \
         capabilities", .lacking.join(", ")
    )]
    Lacking {
        /// The caller.
        who: String,
        /// What is missing.
        lacking: Vec<&'static str>,
    },
}

/// Looks at what the calling process may do.
///
/// # Errors
/// [`PrivilegeError::Unknown`]
pub fn lacking() -> Result<Lacking, PrivilegeError> {
    let state = CapState::get_current();
    let has = state.map_err(|error| PrivilegeError::Unknown(error.into()))?.effective;
    let missing = |of: &[(Cap, &'static str)]| {
        of.iter().filter(|(cap, _)| !has.has(*cap)).map(|(_, name)| *name).collect()
    };
    Ok(Lacking { vital: missing(&VITAL), useful: missing(&USEFUL) })
}

/// Refuses a caller who can't run containers.
///
/// # Errors
/// See [`PrivilegeError`].
pub fn check() -> Result<(), PrivilegeError> {
    let lacking = lacking()?.vital;
    if lacking.is_empty() { Ok(()) } else { Err(PrivilegeError::Lacking { who: who(), lacking }) }
}

/// The caller, as messages name them.
pub fn who() -> String {
    match Uid::effective() {
        uid if uid.is_root() => "root".to_owned(),
        uid => format!("user {uid}"),
    }
}
