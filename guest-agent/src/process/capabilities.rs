//! The five capability sets of a process (capabilities(7), `process.capabilities`).

use std::str::FromStr;

use capctl::caps::{Cap, CapSet, CapState, ambient, bounding};
use oci_spec::runtime::{Capabilities, LinuxCapabilities};

use crate::failure::Failure;

/// All five sets. Without `process.capabilities` all are empty, as for runc.
#[derive(Debug, Clone, Copy)]
pub struct CapabilitySets {
    bounding: CapSet,
    effective: CapSet,
    inheritable: CapSet,
    permitted: CapSet,
    ambient: CapSet,
}

impl CapabilitySets {
    /// Reads `process.capabilities`.
    ///
    /// # Errors
    /// A capability that the guest's kernel doesn't know, by field and name.
    pub fn from_spec(spec: Option<&LinuxCapabilities>) -> Result<Self, Failure> {
        let known = Cap::probe_supported();
        let set = |name: &str, of: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
            read_set(spec.and_then(|spec| of(spec).as_ref()), name, known)
        };
        Ok(Self {
            bounding: set("bounding", LinuxCapabilities::bounding)?,
            effective: set("effective", LinuxCapabilities::effective)?,
            inheritable: set("inheritable", LinuxCapabilities::inheritable)?,
            permitted: set("permitted", LinuxCapabilities::permitted)?,
            ambient: set("ambient", LinuxCapabilities::ambient)?,
        })
    }

    /// Drops from the calling thread's bounding set what is not in this one.
    ///
    /// # Errors
    /// `EPERM` without `CAP_SETPCAP`.
    pub fn limit_bounding(&self) -> capctl::Result<()> {
        for capability in Cap::iter().filter(|capability| !self.bounding.has(*capability)) {
            bounding::ensure_dropped(capability)?;
        }
        Ok(())
    }

    /// Gives the calling thread these sets, with `kept` in effect on top until [`Self::finish`].
    ///
    /// # Errors
    /// `EPERM` for a capability that the thread doesn't have.
    pub fn apply(&self, kept: Option<Cap>) -> capctl::Result<()> {
        let (mut effective, mut permitted) = (self.effective, self.permitted);
        effective.add_all(kept);
        permitted.add_all(kept);
        CapState { effective, permitted, inheritable: self.inheritable }.set_current()?;
        ambient::clear()?;
        for capability in self.ambient.iter() {
            // runc passes over what is not both permitted and inheritable; so does the kernel's rule.
            if self.permitted.has(capability) && self.inheritable.has(capability) {
                ambient::raise(capability)?;
            }
        }
        Ok(())
    }

    /// Drops what [`Self::apply`] kept: one system call.
    ///
    /// # Errors
    /// None that capset(2) can give for dropping, but a seccomp filter may forbid it.
    pub fn finish(&self) -> capctl::Result<()> {
        let Self { effective, permitted, inheritable, .. } = *self;
        CapState { effective, permitted, inheritable }.set_current()
    }
}

fn read_set(names: Option<&Capabilities>, set: &str, known: CapSet) -> Result<CapSet, Failure> {
    let mut capabilities = CapSet::empty();
    for name in names.into_iter().flatten() {
        let name = format!("CAP_{name}");
        match Cap::from_str(&name) {
            Ok(capability) if known.has(capability) => capabilities.add(capability),
            _ => {
                return Err(Failure::config(format!(
                    "process.capabilities.{set}: the guest's kernel has no {name}"
                )));
            }
        }
    }
    Ok(capabilities)
}

#[cfg(test)]
mod tests {
    use super::*;
    use oci_spec::runtime::Capability;
    use std::collections::HashSet;

    #[test]
    fn every_name_of_the_specification_is_known() {
        let json = |name: Capability| serde_json::to_string(&name).expect("serialises");
        for capability in [Capability::Chown, Capability::SysAdmin, Capability::CheckpointRestore] {
            let name = format!("CAP_{capability}");
            assert_eq!(json(capability), format!("\"{name}\""));
            assert!(Cap::from_str(&name).is_ok(), "{name}");
        }
    }

    #[test]
    fn absent_capabilities_are_none() {
        let sets = CapabilitySets::from_spec(None).expect("reads");
        assert!(sets.bounding.is_empty() && sets.effective.is_empty() && sets.ambient.is_empty());
    }

    #[test]
    fn unknown_to_the_kernel_is_refused_by_name() {
        let names = HashSet::from([Capability::NetRaw]);
        let failure = read_set(Some(&names), "bounding", CapSet::empty()).expect_err("unknown");
        assert_eq!(
            failure.message,
            "process.capabilities.bounding: the guest's kernel has no CAP_NET_RAW"
        );
    }
}
