//! The limits that the host keeps for a sandbox, from `linux.resources`.
//!
//! The exact limits are the guest's: its kernel knows the container's processes. The host's bound
//! what the whole machine may take, and are what callers read and account by, so each is the
//! bundle's plus what the machine itself needs:
//!
//! * memory: the guest's memory, which is sized by the bundle's limit, as much again for what the
//!   files that it knows take of the host ([`FILES_MIB`] at most), plus [`OVERHEAD_MIB`]; under the
//!   emulated engine [`TRANSLATION_MIB`] more. Swap and reservation keep their distance to it.
//! * tasks: the bundle's limit plus [`OVERHEAD_TASKS`].
//! * CPU quota, shares, sets and block I/O: as in the bundle. The quota begins once the container
//!   is set up: the boot of the guest isn't the container's.
//!
//! What the bundle does not limit is not limited here. Devices, huge pages, network classes and
//! `unified` are about what is inside the container, and the guest's alone.

use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources, LinuxThrottleDevice};
use serde::{Deserialize, Serialize};

use crate::sandbox::Engine;

/// Memory in MiB that the processes of a sandbox get beside the guest's.
pub const OVERHEAD_MIB: u64 = 256;
/// The most memory in MiB that the files which a guest knows take of the host. Each is an open file of
/// `kiln fs`: the host's kernel keeps file, name and inode, 2.3 KiB, and `kiln fs` a note of half a KiB
/// (measured with 17,000 files on ext4). So much is a million, which `kiln fs` has open at most. A guest
/// knows fewer: each takes a third as much of its own memory, the whole of which is not for that.
pub const FILES_MIB: u64 = 3072;
/// Memory in MiB that the emulated engine gets for translated code.
pub const TRANSLATION_MIB: u64 = 1024;
/// Tasks that the processes of a sandbox get beside the bundle's limit.
pub const OVERHEAD_TASKS: i64 = 512;

/// Stands for the quota that is in force.
pub const KEPT: &str = "-";

/// A value for a file of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Setting {
    /// The field that asks for it, below `linux.resources`.
    pub field: String,
    /// In version 1: the controller, the file, and the value.
    pub v1: Option<(String, String, String)>,
    /// In version 2: the file and the value. That of `cpu.max` may begin with [`KEPT`], or lack the period.
    pub v2: Option<(String, String)>,
}

/// CPU time in the words of `cpu.max`: the quota, and the period in µs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuTime {
    pub quota: String,
    pub period: String,
}

impl Default for CpuTime {
    /// What the kernel has for a new cgroup.
    fn default() -> Self {
        Self { quota: "max".to_owned(), period: "100000".to_owned() }
    }
}

impl Setting {
    /// With what a change of CPU time doesn't name as it is in force.
    pub fn completed(&self, in_force: &CpuTime) -> Self {
        let mut whole = self.clone();
        if let Some((file, value)) = &mut whole.v2
            && file == "cpu.max"
        {
            let (quota, period) = value.split_once(' ').unwrap_or((&**value, &in_force.period));
            let quota = if quota == KEPT { &in_force.quota } else { quota };
            *value = format!("{quota} {period}");
        }
        whole
    }
}

/// The settings for a sandbox.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// From the start.
    pub standing: Vec<Setting>,
    /// Of CPU time, once the container is set up.
    pub cpu_time: Vec<Setting>,
}

/// The machine whose processes are limited.
#[derive(Debug, Clone, Copy)]
pub struct Machine {
    /// What executes its code.
    pub engine: Engine,
    /// The guest's memory in MiB.
    pub memory_mib: u64,
}

impl Machine {
    /// The most memory in bytes that the processes need.
    fn memory(self) -> u64 {
        let translation = match self.engine {
            Engine::Kvm => 0,
            Engine::Emulated => TRANSLATION_MIB,
        };
        self.memory_mib
            .saturating_add(self.memory_mib.min(FILES_MIB))
            .saturating_add(OVERHEAD_MIB)
            .saturating_add(translation)
            .saturating_mul(1 << 20)
    }
}

impl Limits {
    /// The limits of a machine for a container with these resources.
    pub fn of(resources: &LinuxResources, machine: Machine) -> Self {
        let mut settings = Settings::default();
        if let Some(memory) = resources.memory() {
            settings.memory(memory, machine.memory());
        }
        if let Some(cpu) = resources.cpu() {
            settings.cpu(cpu);
        }
        if let Some(limit) = resources.pids().as_ref().map(|pids| pids.limit()).filter(|l| *l != 0)
        {
            let limit = match limit {
                1.. => limit.saturating_add(OVERHEAD_TASKS).to_string(),
                _ => "max".to_owned(),
            };
            settings.both("pids.limit", "pids", ("pids.max", &limit), ("pids.max", &limit));
        }
        if let Some(block_io) = resources.block_io() {
            settings.block_io(block_io);
        }
        let cpu_time = resources.cpu().as_ref().map(cpu_time).unwrap_or_default();
        Self { standing: settings.0, cpu_time }
    }
}

#[derive(Default)]
struct Settings(Vec<Setting>);

impl Settings {
    fn both(&mut self, field: &str, controller: &str, v1: (&str, &str), v2: (&str, &str)) {
        self.0.push(Setting {
            field: field.to_owned(),
            v1: Some((controller.to_owned(), v1.0.to_owned(), v1.1.to_owned())),
            v2: Some((v2.0.to_owned(), v2.1.to_owned())),
        });
    }

    fn memory(&mut self, memory: &LinuxMemory, machine: u64) {
        let Some(limit) = memory.limit().and_then(positive) else { return };
        let total = machine.to_string();
        let above = |value: u64| machine.saturating_add(value.saturating_sub(limit)).to_string();
        self.both(
            "memory.limit",
            "memory",
            ("memory.limit_in_bytes", &total),
            ("memory.max", &total),
        );
        match memory.swap() {
            Some(swap @ 1..) => {
                let swap = swap.unsigned_abs();
                let v2 = swap.saturating_sub(limit).to_string();
                let v1 = ("memory.memsw.limit_in_bytes", &*above(swap));
                self.both("memory.swap", "memory", v1, ("memory.swap.max", &v2));
            }
            Some(-1) => {
                let v1 = ("memory.memsw.limit_in_bytes", "-1");
                self.both("memory.swap", "memory", v1, ("memory.swap.max", "max"));
            }
            _ => {}
        }
        if let Some(reservation) = memory.reservation().and_then(positive) {
            let reserved = machine.saturating_sub(limit.saturating_sub(reservation)).to_string();
            let v1 = ("memory.soft_limit_in_bytes", &*reserved);
            self.both("memory.reservation", "memory", v1, ("memory.low", &reserved));
        }
    }

    fn cpu(&mut self, cpu: &LinuxCpu) {
        if let Some(shares) = cpu.shares().filter(|shares| *shares > 0) {
            let (v1, v2) = (shares.to_string(), weight_of(shares).to_string());
            self.both("cpu.shares", "cpu", ("cpu.shares", &v1), ("cpu.weight", &v2));
        }
        if let Some(idle) = cpu.idle() {
            let idle = idle.to_string();
            self.both("cpu.idle", "cpu", ("cpu.idle", &idle), ("cpu.idle", &idle));
        }
        let sets =
            [("cpuset.cpus", "cpu.cpus", cpu.cpus()), ("cpuset.mems", "cpu.mems", cpu.mems())];
        for (file, field, set) in sets {
            if let Some(set) = set.as_ref().filter(|set| !set.is_empty()) {
                self.both(field, "cpuset", (file, set), (file, set));
            }
        }
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) {
        if let Some(weight) = block_io.weight().filter(|weight| *weight > 0) {
            let weight = weight.to_string();
            let files = (("blkio.bfq.weight", &*weight), ("io.bfq.weight", &*weight));
            self.both("blockIO.weight", "blkio", files.0, files.1);
        }
        let throttles = [
            ("throttleReadBpsDevice", "read_bps", "rbps", block_io.throttle_read_bps_device()),
            ("throttleWriteBpsDevice", "write_bps", "wbps", block_io.throttle_write_bps_device()),
            ("throttleReadIOPSDevice", "read_iops", "riops", block_io.throttle_read_iops_device()),
            (
                "throttleWriteIOPSDevice",
                "write_iops",
                "wiops",
                block_io.throttle_write_iops_device(),
            ),
        ];
        for (field, v1, v2, devices) in throttles {
            for device in devices.iter().flatten() {
                self.throttle(field, v1, v2, device);
            }
        }
    }

    fn throttle(&mut self, field: &str, v1: &str, v2: &str, device: &LinuxThrottleDevice) {
        let number = format!("{}:{}", device.major(), device.minor());
        let file = format!("blkio.throttle.{v1}_device");
        let (of_v1, of_v2) =
            (format!("{number} {}", device.rate()), format!("{number} {v2}={}", device.rate()));
        let field = format!("blockIO.{field}");
        self.both(&field, "blkio", (&file, &of_v1), ("io.max", &of_v2));
    }
}

/// Quota and period have one file in version 2 and two in version 1. Either may be changed without the
/// other.
fn cpu_time(cpu: &LinuxCpu) -> Vec<Setting> {
    let of_v1 = |field: &str, file: &str, value: String| Setting {
        field: field.to_owned(),
        v1: Some(("cpu".to_owned(), file.to_owned(), value)),
        v2: None,
    };
    let mut settings = Vec::new();
    let period = cpu.period().filter(|period| *period > 0);
    let quota = cpu.quota().filter(|quota| *quota != 0);
    if let Some(period) = period {
        settings.push(of_v1("cpu.period", "cpu.cfs_period_us", period.to_string()));
    }
    if let Some(quota) = quota {
        settings.push(of_v1("cpu.quota", "cpu.cfs_quota_us", quota.max(-1).to_string()));
    }
    if period.is_some() || quota.is_some() {
        let time = |quota| positive(quota).map_or_else(|| "max".to_owned(), |q| q.to_string());
        let quota = quota.map_or_else(|| KEPT.to_owned(), time);
        let value = period.map_or_else(|| quota.clone(), |period| format!("{quota} {period}"));
        let v2 = Some(("cpu.max".to_owned(), value));
        settings.push(Setting { field: "cpu.quota".to_owned(), v1: None, v2 });
    }
    if let Some(burst) = cpu.burst() {
        let v2 = Some(("cpu.max.burst".to_owned(), burst.to_string()));
        settings.push(Setting { v2, ..of_v1("cpu.burst", "cpu.cfs_burst_us", burst.to_string()) });
    }
    settings
}

fn positive(value: i64) -> Option<u64> {
    u64::try_from(value).ok().filter(|value| *value > 0)
}

/// The weight of version 2, 1 to 10000, for shares of version 1, 2 to 262144: as runc and systemd
/// convert it, linearly.
fn weight_of(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    const KVM: Machine = Machine { engine: Engine::Kvm, memory_mib: 1000 };

    fn limits(resources: Value) -> Limits {
        Limits::of(&serde_json::from_value(resources).expect("resources"), KVM)
    }

    fn v1(limits: &[Setting]) -> Vec<(&str, &str)> {
        limits.iter().filter_map(|s| s.v1.as_ref()).map(|(_, f, v)| (&**f, &**v)).collect()
    }

    fn v2(limits: &[Setting]) -> Vec<(&str, &str)> {
        limits.iter().filter_map(|s| s.v2.as_ref()).map(|(f, v)| (&**f, &**v)).collect()
    }

    #[test]
    fn nothing_asked_for_is_nothing_limited() {
        assert_eq!(limits(json!({})), Limits::default());
        let none = json!({"memory": {"limit": -1}, "pids": {"limit": 0}, "cpu": {"shares": 0, "quota": 0}});
        assert_eq!(limits(none), Limits::default());
    }

    #[test]
    fn memory_is_the_machines_with_its_overhead() {
        let mib = |mib: u64| (mib << 20).to_string();
        let memory = json!({"memory": {
            "limit": 800u64 << 20, "swap": 900u64 << 20, "reservation": 700u64 << 20,
        }});
        let found = limits(memory);
        let total = mib(2 * 1000 + OVERHEAD_MIB);
        assert_eq!(
            v2(&found.standing),
            [
                ("memory.max", &*total),
                ("memory.swap.max", &*mib(100)),
                ("memory.low", &*mib(2 * 1000 - 100 + OVERHEAD_MIB)),
            ]
        );
        assert_eq!(
            v1(&found.standing)[1],
            ("memory.memsw.limit_in_bytes", &*mib(2 * 1000 + 100 + OVERHEAD_MIB))
        );
    }

    #[test]
    fn tasks_cpus_and_disks_are_limited() {
        let found = limits(json!({
            "pids": {"limit": 10},
            "cpu": {"shares": 1024, "quota": 50_000, "cpus": "0-1", "burst": 7},
            "blockIO": {"throttleReadBpsDevice": [{"major": 8, "minor": 1, "rate": 99}]},
        }));
        let tasks = (10 + OVERHEAD_TASKS).to_string();
        assert_eq!(
            v1(&found.standing),
            [
                ("cpu.shares", "1024"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", &*tasks),
                ("blkio.throttle.read_bps_device", "8:1 99"),
            ]
        );
        assert_eq!(
            v2(&found.standing),
            [
                ("cpu.weight", "39"),
                ("cpuset.cpus", "0-1"),
                ("pids.max", &*tasks),
                ("io.max", "8:1 rbps=99"),
            ]
        );
        assert_eq!(v1(&found.cpu_time), [("cpu.cfs_quota_us", "50000"), ("cpu.cfs_burst_us", "7")]);
        assert_eq!(v2(&found.cpu_time), [("cpu.max", "50000"), ("cpu.max.burst", "7")]);
        let unlimited = limits(json!({"pids": {"limit": -1}, "cpu": {"quota": -1}}));
        assert_eq!(v2(&unlimited.standing), [("pids.max", "max")]);
        assert_eq!(v2(&unlimited.cpu_time), [("cpu.max", "max")]);
        let period = limits(json!({"cpu": {"period": 20_000}}));
        assert_eq!(v2(&period.cpu_time), [("cpu.max", "- 20000")]);
    }

    proptest! {
        #[test]
        fn memory_is_never_less_than_the_machines_own(limit: i64, swap: i64, memory_mib: u64) {
            let memory = json!({"memory": {"limit": limit, "swap": swap}});
            let resources = serde_json::from_value(memory).expect("resources");
            let found = Limits::of(&resources, Machine { memory_mib, ..KVM });
            for (_, value) in v1(&found.standing) {
                let enough = memory_mib.saturating_mul(1 << 20);
                prop_assert!(value == "-1" || value.parse::<u64>().expect("a number") >= enough);
            }
        }

        #[test]
        fn weights_are_in_range_and_rise(shares: u64, more in 0u64..1000) {
            let weight = weight_of(shares);
            prop_assert!((1..=10_000).contains(&weight));
            prop_assert!(weight_of(shares.saturating_add(more)) >= weight);
        }
    }

    #[test]
    fn what_a_change_does_not_name_stays() {
        let in_force =
            |quota: &str| CpuTime { quota: quota.to_owned(), period: "50000".to_owned() };
        for (had, file, value, whole) in [
            ("40000", "cpu.max", "- 80000", "40000 80000"),
            ("max", "cpu.max", "- 80000", "max 80000"),
            ("40000", "cpu.max", "70000", "70000 50000"),
            ("40000", "cpu.max", "max", "max 50000"),
            ("40000", "cpu.max", "70000 90000", "70000 90000"),
            ("40000", "pids.max", "7", "7"),
        ] {
            let v2 = Some((file.to_owned(), value.to_owned()));
            let change = Setting { field: String::new(), v1: None, v2 };
            let (_, found) = change.completed(&in_force(had)).v2.expect("a value");
            assert_eq!(found, whole);
        }
    }
}
