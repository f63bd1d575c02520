//! The size of a container's machine.
//!
//! CPUs: what a flag, an annotation or the configuration file asks for; else the bundle's CPU quota
//! divided by its period, rounded up; else the number of CPUs in its cpuset; else
//! [`DEFAULT_CPUS`]. Memory: likewise asked for; else the bundle's memory limit plus
//! [`OVERHEAD_MIB`] and a 32nd of the limit for the guest's kernel and agent; else
//! [`DEFAULT_MEMORY_MIB`]. The machine of a pod's sandbox is sized by what its containers may take
//! ([`pod::sum`]) instead of its own limits. What is asked for must be within what the host has; what is derived is
//! brought within it, since a limit is kept all the same.

use std::num::NonZero;

use oci_spec::runtime::Spec;

use super::pod;

/// CPUs of a machine that nothing else decides.
pub const DEFAULT_CPUS: u8 = 2;
/// Memory in MiB of a machine that nothing else decides.
pub const DEFAULT_MEMORY_MIB: u64 = 2048;
/// Memory in MiB that the guest's kernel and agent get beside a container's limit.
pub const OVERHEAD_MIB: u64 = 96;
/// The least memory in MiB in which the guest's kernel and agent start.
pub const MIN_MEMORY_MIB: u64 = 128;
/// The most CPUs of a machine.
pub const MAX_CPUS: u8 = 32;

/// A machine's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// vCPUs, 1 to 32.
    pub cpus: u8,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// What was asked for, by whatever comes before the bundle's own limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// vCPUs.
    pub cpus: Option<u8>,
    /// Memory in MiB.
    pub memory_mib: Option<u64>,
}

/// What the host has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Host {
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory in MiB.
    pub memory_mib: u64,
}

/// Why no machine of the size that was asked for can be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// CPUs out of range.
    #[error("{asked} CPUs asked for: use 1 to {most}, this host has {host}")]
    Cpus {
        /// What was asked for.
        asked: u8,
        /// The most that can be.
        most: u8,
        /// What the host has.
        host: usize,
    },
    /// Less memory than a guest starts in.
    #[error(
        "{asked} MiB of memory asked for: a guest needs at least {MIN_MEMORY_MIB} MiB (--memory, \
         io.kiln.memory-mib, memory_mib of the configuration file)"
    )]
    TooLittleMemory {
        /// What was asked for, in MiB.
        asked: u64,
    },
    /// More memory than there is.
    #[error(
        "{asked} MiB of memory asked for: this host has {host} MiB: ask for less (--memory, \
         io.kiln.memory-mib, memory_mib of the configuration file)"
    )]
    TooMuchMemory {
        /// What was asked for, in MiB.
        asked: u64,
        /// What the host has, in MiB.
        host: u64,
    },
}

impl Host {
    /// Asks the kernel.
    pub fn detect() -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, NonZero::get);
        let memory = nix::sys::sysinfo::sysinfo().map_or(u64::MAX, |info| info.ram_total());
        Self { cpus, memory_mib: memory >> 20 }
    }

    fn most_cpus(self) -> u8 {
        u8::try_from(self.cpus).unwrap_or(MAX_CPUS).clamp(1, MAX_CPUS)
    }
}

impl Size {
    /// Decides the size of a bundle's machine.
    ///
    /// # Errors
    /// What was asked for is out of range.
    pub fn decide(asked: Limits, spec: &Spec, host: Host) -> Result<Self, SizeError> {
        let limits = limits_of(spec);
        let most = host.most_cpus();
        let cpus = match asked.cpus {
            Some(asked) if asked == 0 || asked > most => {
                return Err(SizeError::Cpus { asked, most, host: host.cpus });
            }
            Some(asked) => asked,
            None => limits.cpus.unwrap_or(DEFAULT_CPUS).clamp(1, most),
        };
        let memory_mib = match asked.memory_mib {
            Some(asked) if asked < MIN_MEMORY_MIB => {
                return Err(SizeError::TooLittleMemory { asked });
            }
            Some(asked) if asked > host.memory_mib => {
                return Err(SizeError::TooMuchMemory { asked, host: host.memory_mib });
            }
            Some(asked) => asked,
            None => limits
                .memory_mib
                .map_or(DEFAULT_MEMORY_MIB, with_overhead)
                .clamp(MIN_MEMORY_MIB, host.memory_mib.max(MIN_MEMORY_MIB)),
        };
        Ok(Self { cpus, memory_mib })
    }
}

fn with_overhead(limit_mib: u64) -> u64 {
    limit_mib.saturating_add(limit_mib / 32).saturating_add(OVERHEAD_MIB)
}

/// The bundle's memory limit in bytes, if it has one.
pub fn memory_limit(spec: &Spec) -> Option<u64> {
    let resources = spec.linux().as_ref()?.resources().as_ref()?;
    let limit = u64::try_from(resources.memory().as_ref()?.limit()?).ok()?;
    (limit > 0).then_some(limit)
}

/// The bundle's own limits, before they become a size. Those of a pod's sandbox are its containers',
/// which come later.
fn limits_of(spec: &Spec) -> Limits {
    if matches!(pod::find(spec), Ok(Some(pod::Part::Sandbox))) {
        let pod::Sum { cpus, memory } = pod::sum(spec);
        return Limits {
            cpus: cpus.map(|cpus| u8::try_from(cpus).unwrap_or(u8::MAX)),
            memory_mib: memory.map(|memory| memory.div_ceil(1 << 20)),
        };
    }
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let quota = cpu.and_then(|cpu| {
        let quota = u64::try_from(cpu.quota()?).ok().filter(|quota| *quota > 0)?;
        let period = cpu.period().filter(|period| *period > 0).unwrap_or(100_000);
        Some(quota.div_ceil(period))
    });
    let set = cpu.and_then(|cpu| count_cpus(cpu.cpus().as_deref()?));
    Limits {
        cpus: quota.or(set).map(|cpus| u8::try_from(cpus).unwrap_or(u8::MAX)),
        memory_mib: memory_limit(spec).map(|limit| limit.div_ceil(1 << 20)),
    }
}

/// The number of CPUs in a list like `0-3,7`.
fn count_cpus(list: &str) -> Option<u64> {
    let mut count: u64 = 0;
    for range in list.trim().split(',').filter(|range| !range.is_empty()) {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.trim().parse().ok()?, last.trim().parse().ok()?);
        count += u64::from(last.checked_sub(first)?) + 1;
    }
    Some(count).filter(|count| *count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const HOST: Host = Host { cpus: 8, memory_mib: 16_000 };

    fn decide(asked: Limits, resources: Value) -> Result<Size, SizeError> {
        let spec = json!({"ociVersion": "1.0.2", "linux": {"resources": resources}});
        Size::decide(asked, &serde_json::from_value(spec).expect("spec"), HOST)
    }

    #[test]
    fn nothing_said_gives_the_defaults() {
        let size = decide(Limits::default(), json!({})).expect("fits");
        assert_eq!(size, Size { cpus: 2, memory_mib: 2048 });
    }

    #[test]
    fn limits_of_the_bundle_size_the_machine() {
        for (cpu, expected) in [
            (json!({"quota": 150_000, "period": 100_000}), 2),
            (json!({"quota": 50_000}), 1),
            (json!({"quota": -1, "cpus": "0-2,6"}), 4),
            (json!({"quota": 10_000_000}), 8),
            (json!({"cpus": "3-1"}), 2),
        ] {
            let size = decide(Limits::default(), json!({"cpu": cpu})).expect("fits");
            assert_eq!(size.cpus, expected, "{cpu}");
        }
        let memory = json!({"memory": {"limit": 1u64 << 30}});
        let size = decide(Limits::default(), memory).expect("fits");
        assert_eq!(size.memory_mib, 1024 + 32 + OVERHEAD_MIB);
        let unlimited = decide(Limits::default(), json!({"memory": {"limit": -1}})).expect("fits");
        assert_eq!(unlimited.memory_mib, DEFAULT_MEMORY_MIB);
    }

    #[test]
    fn machine_of_a_pod_is_sized_by_its_containers_limits() {
        let spec = json!({
            "ociVersion": "1.0.2",
            "annotations": {
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-memory": "1073741824",
                "io.kubernetes.cri.sandbox-cpu-quota": "300000",
            },
            "linux": {"resources": {"cpu": {"shares": 2, "cpus": "0"}, "memory": {"limit": 1 << 26}}},
        });
        let spec = serde_json::from_value(spec).expect("spec");
        let size = Size::decide(Limits::default(), &spec, HOST).expect("fits");
        assert_eq!(size, Size { cpus: 3, memory_mib: 1024 + 32 + OVERHEAD_MIB });
    }

    #[test]
    fn what_is_asked_for_overrides_but_must_fit() {
        let asked = |cpus, memory_mib| Limits { cpus, memory_mib };
        let cpu = json!({"cpu": {"quota": 400_000}});
        assert_eq!(decide(asked(Some(1), Some(256)), cpu).expect("fits").cpus, 1);
        for cpus in [0, 9, 33] {
            let error = decide(asked(Some(cpus), None), json!({})).expect_err("out of range");
            assert!(matches!(error, SizeError::Cpus { .. }));
        }
        let error = decide(asked(None, Some(100)), json!({})).expect_err("too little");
        assert_eq!(error, SizeError::TooLittleMemory { asked: 100 });
        let error = decide(asked(None, Some(16_001)), json!({})).expect_err("too much");
        assert_eq!(error, SizeError::TooMuchMemory { asked: 16_001, host: 16_000 });
    }
}
