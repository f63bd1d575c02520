//! The part of the `capng` crate's interface that `virtiofsd` calls, over the system calls alone.
//!
//! `virtiofsd` drops `CAP_FSETID` around a write so that the kernel clears set-id bits, and asks for
//! it through `capng`, a binding of the C library libcap-ng. That library reads `/proc` when it is
//! first used, which an fs backend doesn't have any more by then, and would be the only C library
//! that building kiln needs. This crate takes its place (`[patch.crates-io]`). As with libcap-ng,
//! [`update`] stages a change for the calling thread and [`apply`] makes it.
//!
//! Only the effective set can be changed and only the capabilities that an fs backend holds have
//! names: anything else is an error, never silently ignored.

use std::cell::Cell;
use std::fmt;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// A capability's number, as in `linux/capability.h`.
pub type Capability = u32;

/// The names that are known, without `CAP_`.
const NAMES: [(&str, Capability); 9] = [
    ("CHOWN", 0),
    ("DAC_OVERRIDE", 1),
    ("DAC_READ_SEARCH", 2),
    ("FOWNER", 3),
    ("FSETID", 4),
    ("SETGID", 6),
    ("SETUID", 7),
    ("MKNOD", 27),
    ("SETFCAP", 31),
];

/// Why a capability could not be changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Error {
    /// The kernel refused.
    ApplyCapabilities,
    /// The name isn't one of those known.
    GetCapabilityId,
    /// The kernel did not tell the thread's sets.
    GetProcessCapabilities,
    /// The change is none that this crate makes.
    UpdateCapability(Capability),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ApplyCapabilities => write!(f, "failed to set the thread's capabilities"),
            Self::GetCapabilityId => write!(f, "no such capability"),
            Self::GetProcessCapabilities => write!(f, "failed to read the thread's capabilities"),
            Self::UpdateCapability(number) => write!(f, "cannot change capability {number}"),
        }
    }
}

impl std::error::Error for Error {}

/// A result with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// Whether a capability is added to a set or taken from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Take it away.
    DROP,
    /// Add it.
    ADD,
}

/// One of a thread's sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Type(u32);

impl Type {
    /// The effective set.
    pub const EFFECTIVE: Self = Self(1);
    /// The permitted set.
    pub const PERMITTED: Self = Self(2);
}

/// What [`apply`] and [`clear`] act on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Set(u32);

impl Set {
    /// The thread's own sets.
    pub const CAPS: Self = Self(16);
    /// The bounding set as well.
    pub const BOTH: Self = Self(48);
}

/// A change to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CUpdate {
    /// What is done.
    pub action: Action,
    /// To which set.
    pub cap_type: Type,
    /// With which capability.
    pub capability: Capability,
}

thread_local! {
    static STAGED: Cell<Option<CapabilitySets>> = const { Cell::new(None) };
}

fn bit(capability: Capability) -> Result<CapabilitySet> {
    1u64.checked_shl(capability)
        .and_then(CapabilitySet::from_bits)
        .ok_or(Error::UpdateCapability(capability))
}

fn current() -> Result<CapabilitySets> {
    capabilities(None).map_err(|_| Error::GetProcessCapabilities)
}

/// The number of a capability by its name without `CAP_`.
///
/// # Errors
/// [`Error::GetCapabilityId`] if it isn't one that an fs backend holds.
pub fn name_to_capability(name: &str) -> Result<Capability> {
    let known = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
    known.map(|(_, number)| *number).ok_or(Error::GetCapabilityId)
}

/// Whether the calling thread has a capability in a set.
pub fn have_capability(which: Type, capability: Capability) -> bool {
    let (Ok(sets), Ok(bit)) = (current(), bit(capability)) else {
        return false;
    };
    match which {
        Type::EFFECTIVE => sets.effective.contains(bit),
        _ => sets.permitted.contains(bit),
    }
}

/// Begins a change with the sets that the thread has.
///
/// # Errors
/// [`Error::GetProcessCapabilities`].
pub fn get_caps_process() -> Result<()> {
    STAGED.set(Some(current()?));
    Ok(())
}

/// Stages changes of the effective set.
///
/// # Errors
/// [`Error::UpdateCapability`] for another set or an unknown number.
pub fn update(updates: Vec<CUpdate>) -> Result<()> {
    let mut sets = match STAGED.take() {
        Some(sets) => sets,
        None => current()?,
    };
    for CUpdate { action, cap_type, capability } in updates {
        if cap_type != Type::EFFECTIVE {
            return Err(Error::UpdateCapability(capability));
        }
        sets.effective.set(bit(capability)?, action == Action::ADD);
    }
    STAGED.set(Some(sets));
    Ok(())
}

/// Stages the loss of every capability.
pub fn clear(_set: Set) {
    let none = CapabilitySet::empty();
    STAGED.set(Some(CapabilitySets { effective: none, permitted: none, inheritable: none }));
}

/// Makes the staged changes, for the calling thread. The bounding set is left as it is: a process
/// that execs nothing gains nothing from it.
///
/// # Errors
/// [`Error::ApplyCapabilities`] when the kernel refuses.
pub fn apply(_set: Set) -> Result<()> {
    let Some(sets) = STAGED.take() else {
        return Ok(());
    };
    set_capabilities(None, sets).map_err(|_| Error::ApplyCapabilities)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_capability_comes_back() {
        std::thread::spawn(|| {
            let fsetid = name_to_capability("FSETID").unwrap();
            assert!(have_capability(Type::EFFECTIVE, fsetid), "this test needs CAP_FSETID: root");
            let change = |action| CUpdate { action, cap_type: Type::EFFECTIVE, capability: fsetid };
            update(vec![change(Action::DROP)]).unwrap();
            apply(Set::CAPS).unwrap();
            assert!(!have_capability(Type::EFFECTIVE, fsetid));
            assert!(have_capability(Type::PERMITTED, fsetid));
            update(vec![change(Action::ADD)]).unwrap();
            apply(Set::CAPS).unwrap();
            assert!(have_capability(Type::EFFECTIVE, fsetid));
        })
        .join()
        .unwrap();
    }

    #[test]
    fn what_is_not_known_is_an_error() {
        assert_eq!(name_to_capability("SYS_ADMIN"), Err(Error::GetCapabilityId));
        let change = CUpdate { action: Action::ADD, cap_type: Type::PERMITTED, capability: 4 };
        assert_eq!(update(vec![change]), Err(Error::UpdateCapability(4)));
        let change = CUpdate { action: Action::ADD, cap_type: Type::EFFECTIVE, capability: 64 };
        assert_eq!(update(vec![change]), Err(Error::UpdateCapability(64)));
    }
}
