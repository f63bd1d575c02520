//! Capabilities of a jailed process.

use std::io;

use capctl::caps::{CapSet, CapState, ambient, bounding};
use capctl::prctl::{self, Secbits};

use super::error::{During, JailError};

const BOUNDING: &str = "empty the capability bounding set";

/// Empties the bounding set but for `kept`, and locks the securebits so that neither uid 0 nor a
/// change of uid nor an exec ever gives capabilities again. From here on a change of uid does not
/// take any away either: [`reduce_to`] does.
///
/// # Errors
/// The kernel refuses: the process has no `CAP_SETPCAP`.
pub fn lock(kept: CapSet) -> Result<(), JailError> {
    drop_from_bounding_set(!kept)?;
    bounding::clear_unknown().map_err(os).during(BOUNDING)?;
    prctl::set_securebits(
        Secbits::NOROOT
            | Secbits::NOROOT_LOCKED
            | Secbits::NO_SETUID_FIXUP
            | Secbits::NO_SETUID_FIXUP_LOCKED
            | Secbits::KEEP_CAPS_LOCKED
            | Secbits::NO_CAP_AMBIENT_RAISE
            | Secbits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )
    .map_err(os)
    .during("lock the securebits")
}

/// Takes capabilities out of the bounding set, those that the kernel knows.
///
/// # Errors
/// The kernel refuses: the process has no `CAP_SETPCAP`.
pub fn drop_from_bounding_set(dropped: CapSet) -> Result<(), JailError> {
    for cap in dropped.iter() {
        match bounding::drop(cap) {
            // One that is newer than the kernel; those that follow are newer still.
            Err(error) if error.code() == libc::EINVAL => break,
            dropped => dropped.map_err(os).during(BOUNDING)?,
        }
    }
    Ok(())
}

/// Gives up every effective and permitted capability but `kept`, and all inheritable and ambient
/// ones.
///
/// # Errors
/// The kernel refuses: `kept` names one that the process doesn't have.
pub fn reduce_to(kept: CapSet) -> Result<(), JailError> {
    ambient::clear().map_err(os).during("clear the ambient capabilities")?;
    let mut state = CapState::empty();
    state.permitted = kept;
    state.effective = kept;
    state.set_current().map_err(os).during("give up capabilities")
}

fn os(error: capctl::Error) -> io::Error {
    io::Error::from_raw_os_error(error.code())
}
