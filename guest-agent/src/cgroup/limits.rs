//! `linux.resources` in the files of cgroup v2, converted as runc converts them: for a container that
//! is created, and for the update of one that runs, in which what is not set stays as it is.
//!
//! The machine is part of how limits are honoured: it has the memory and the processors that the
//! configuration asks for, and no swap.
//!
//! * `cpu.cpus` names processors of the host. Here its number of processors counts: the container
//!   gets the guest's first so many. `cpu.mems` is for the host, where the guest's memory is.
//! * `blockIO.throttle*Device` are for the host, whose devices they name: its cgroup has them.
//! * `memory.swap` and `memory.swappiness` limit something that the guest doesn't have.
//! * `devices`: [`super::devices`] has them, and an update leaves them alone.
//! * What names the host's block or network devices, and what cgroup v2 has no counterpart of, is
//!   refused.
//! * A container without a limit on processes gets one all the same, a little below what the guest's
//!   kernel can hold, so that the agent can always start what it needs.

use std::fs;
use std::io;
use std::path::Path;

use kiln_protocol::FailurePhase;
use oci_spec::runtime::{LinuxBlockIo, LinuxCpu, LinuxMemory, LinuxResources};

use crate::failure::{During, Failure};

/// Processes kept out of the reach of containers.
const RESERVED_PIDS: u64 = 128;

/// Period of `cpu.max` in microseconds where the configuration has none.
const DEFAULT_PERIOD: u64 = 100_000;

/// What fields that are not set stand for.
#[derive(Debug)]
struct Base {
    /// Limit of memory in bytes.
    memory: Option<i64>,
    /// Bytes of memory in use.
    used: i64,
    /// Quota as in `cpu.max`.
    quota: String,
    /// Period in microseconds, as there.
    period: u64,
}

impl Base {
    /// A container that is new.
    fn new() -> Self {
        Self { memory: None, used: 0, quota: "max".to_owned(), period: DEFAULT_PERIOD }
    }

    /// The container of a cgroup.
    fn of(cgroup: &Path) -> Self {
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
        let bytes = |file: &str| read(file).trim().parse().ok();
        let cpu = read("cpu.max");
        let mut cpu = cpu.split_whitespace();
        let new = Self::new();
        Self {
            memory: bytes("memory.max"),
            used: bytes("memory.current").unwrap_or(0),
            quota: cpu.next().map_or(new.quota, str::to_owned),
            period: cpu.next().and_then(|period| period.parse().ok()).unwrap_or(new.period),
        }
    }
}

/// Values for files of a container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    settings: Vec<Setting>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Setting {
    field: String,
    file: String,
    value: String,
    /// Where the kernel has no such file, there is nothing to limit.
    optional: bool,
}

impl Limits {
    /// Reads `linux.resources` of a container to be created. `cpus` is the guest's number of
    /// processors.
    ///
    /// # Errors
    /// A limit that can't be honoured, by field.
    pub fn from_spec(resources: Option<&LinuxResources>, cpus: usize) -> Result<Self, Failure> {
        let mut limits = Self { settings: Vec::new() };
        limits.pids(resources.and_then(pids_limit).unwrap_or(-1));
        if let Some(resources) = resources {
            limits.read(resources, cpus, &Base::new())?;
        }
        Ok(limits)
    }

    /// Reads the changes for a container that runs in `cgroup`.
    ///
    /// # Errors
    /// As [`Self::from_spec`].
    pub(super) fn of_update(
        resources: &LinuxResources,
        cpus: usize,
        cgroup: &Path,
    ) -> Result<Self, Failure> {
        let mut limits = Self { settings: Vec::new() };
        if let Some(limit) = pids_limit(resources) {
            limits.pids(limit);
        }
        limits.read(resources, cpus, &Base::of(cgroup))?;
        Ok(limits)
    }

    fn read(
        &mut self,
        resources: &LinuxResources,
        cpus: usize,
        base: &Base,
    ) -> Result<(), Failure> {
        let limits = self;
        refuse_foreign(resources)?;
        if let Some(memory) = resources.memory() {
            limits.memory(memory, base)?;
        }
        if let Some(cpu) = resources.cpu() {
            limits.cpu(cpu, cpus, base)?;
        }
        if let Some(block_io) = resources.block_io() {
            limits.block_io(block_io)?;
        }
        for page in resources.hugepage_limits().iter().flatten() {
            let field = format!("hugepageLimits ({})", page.page_size());
            let file = format!("hugetlb.{}.max", page.page_size());
            limits.set(&field, &file, page.limit().to_string());
        }
        let mut unified: Vec<_> = resources.unified().iter().flatten().collect();
        unified.sort();
        for (file, value) in unified {
            if file.contains('/') || file.starts_with('.') {
                return Err(refuse("unified", &format!("{file:?} is no file of a cgroup")));
            }
            limits.set(&format!("unified ({file})"), file, value.clone());
        }
        Ok(())
    }

    /// Writes the limits in place of what a cgroup has. If one is not taken, none is changed.
    pub(super) fn replace(&self, cgroup: &Path) -> Result<(), Failure> {
        let mut before = Vec::new();
        for Setting { field, file, optional, .. } in &self.settings {
            let path = cgroup.join(file);
            match fs::read_to_string(&path) {
                Ok(value) => before.push((path, value)),
                Err(error) if error.kind() != io::ErrorKind::NotFound => {}
                Err(_) if *optional => {}
                Err(_) => return Err(refuse(field, "the guest's kernel has no such limit")),
            }
        }
        self.write(cgroup).inspect_err(|_| {
            for (path, value) in before.iter().rev() {
                // An empty list has to be written as a line; what was in force can be again.
                let _ = super::write_file(path, &format!("{}\n", value.trim_end()));
            }
        })
    }

    pub(super) fn write(&self, cgroup: &Path) -> Result<(), Failure> {
        for Setting { field, file, value, optional } in &self.settings {
            match super::write_file(&cgroup.join(file), value) {
                Err(error) if error.kind() == io::ErrorKind::NotFound && *optional => {}
                written => written.during(FailurePhase::Cgroups, || {
                    format!("linux.resources.{field}: write {value:?} to {file}")
                })?,
            }
        }
        Ok(())
    }

    fn set(&mut self, field: &str, file: &str, value: impl Into<String>) {
        self.add(field, file, value.into(), false);
    }

    fn add(&mut self, field: &str, file: &str, value: String, optional: bool) {
        let (field, file) = (field.to_owned(), file.to_owned());
        self.settings.push(Setting { field, file, value, optional });
    }

    fn pids(&mut self, limit: i64) {
        match limit {
            1.. => self.set("pids.limit", "pids.max", limit.to_string()),
            _ => self.add("pids.limit", "pids.max", default_pids().to_string(), true),
        }
    }

    fn memory(&mut self, memory: &LinuxMemory, base: &Base) -> Result<(), Failure> {
        for (name, value) in [("kernel", memory.kernel()), ("kernelTCP", memory.kernel_tcp())] {
            if value.is_some_and(|value| value > 0) {
                let why = "cgroup v2 has no limit on kernel memory alone";
                return Err(refuse(&format!("memory.{name}"), why));
            }
        }
        if memory.disable_oom_killer() == Some(true) {
            let why = "cgroup v2 cannot switch the OOM killer off";
            return Err(refuse("memory.disableOOMKiller", why));
        }
        let limit = memory.limit().filter(|limit| *limit != 0);
        if let Some(limit) = limit {
            let checked = memory.check_before_update().unwrap_or(false);
            if checked && (0..base.used).contains(&limit) {
                let why = format!("{limit} is below the {} bytes that are in use", base.used);
                return Err(refuse("memory.limit", &why));
            }
            self.set("memory.limit", "memory.max", bytes_or_max(limit));
        }
        if let Some(low) = memory.reservation().filter(|low| *low != 0) {
            self.set("memory.reservation", "memory.low", bytes_or_max(low));
        }
        let Some(swap) = memory.swap().filter(|swap| *swap != 0) else {
            return Ok(());
        };
        let swap = match (swap, limit.or(base.memory)) {
            (..=-1, _) => "max".to_owned(),
            (_, None) => return Err(refuse("memory.swap", "needs a memory.limit")),
            (swap, Some(limit)) if swap < limit => {
                return Err(refuse("memory.swap", "is below memory.limit"));
            }
            (_, Some(..=-1)) => "max".to_owned(),
            (swap, Some(limit)) => (swap - limit).to_string(),
        };
        self.add("memory.swap", "memory.swap.max", swap, true);
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu, guest_cpus: usize, base: &Base) -> Result<(), Failure> {
        let realtime =
            cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0;
        if realtime {
            let why = "cgroup v2 has no limits on real-time scheduling";
            return Err(refuse("cpu.realtimeRuntime, cpu.realtimePeriod", why));
        }
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            self.set("cpu.shares", "cpu.weight", weight_of_shares(shares).to_string());
        }
        if cpu.quota().is_some_and(|quota| quota != 0) || cpu.period().unwrap_or(0) != 0 {
            let quota = match cpu.quota() {
                None | Some(0) => base.quota.clone(),
                Some(..0) => "max".to_owned(),
                Some(quota) => quota.to_string(),
            };
            let period = cpu.period().filter(|period| *period != 0).unwrap_or(base.period);
            self.set("cpu.quota", "cpu.max", format!("{quota} {period}"));
        }
        if let Some(burst) = cpu.burst() {
            self.set("cpu.burst", "cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            self.set("cpu.idle", "cpu.idle", idle.to_string());
        }
        if let Some(list) = cpu.cpus().as_deref().filter(|list| !list.is_empty()) {
            let count = count_of(list)
                .ok_or_else(|| refuse("cpu.cpus", &format!("{list:?} is no list of processors")))?;
            let last = count.min(guest_cpus).max(1) - 1;
            self.set("cpu.cpus", "cpuset.cpus", format!("0-{last}"));
        }
        Ok(())
    }

    fn block_io(&mut self, block_io: &LinuxBlockIo) -> Result<(), Failure> {
        if block_io.weight_device().as_ref().is_some_and(|list| !list.is_empty()) {
            return Err(refuse("blockIO.weightDevice", FOREIGN_DEVICE));
        }
        if block_io.leaf_weight().unwrap_or(0) != 0 {
            return Err(refuse("blockIO.leafWeight", "cgroup v2 has no such weight"));
        }
        if let Some(weight) = block_io.weight().filter(|weight| *weight != 0) {
            if !(10..=1000).contains(&weight) {
                return Err(refuse("blockIO.weight", "must be from 10 to 1000"));
            }
            let weight = 1 + (u64::from(weight) - 10) * 9999 / 990;
            self.add("blockIO.weight", "io.weight", weight.to_string(), true);
        }
        Ok(())
    }
}

const FOREIGN_DEVICE: &str = "names a device of the host, which the guest doesn't have";

fn refuse(field: &str, why: &str) -> Failure {
    Failure::config(format!("linux.resources.{field}: {why}"))
}

fn refuse_foreign(resources: &LinuxResources) -> Result<(), Failure> {
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return Err(refuse("rdma", FOREIGN_DEVICE));
    }
    let Some(network) = resources.network() else {
        return Ok(());
    };
    if network.class_id().unwrap_or(0) != 0 {
        return Err(refuse("network.classID", "cgroup v2 has no network classes"));
    }
    if network.priorities().as_ref().is_some_and(|priorities| !priorities.is_empty()) {
        return Err(refuse("network.priorities", "cgroup v2 has no network priorities"));
    }
    Ok(())
}

/// `pids.limit`, of which 0 is none and -1 none in particular.
fn pids_limit(resources: &LinuxResources) -> Option<i64> {
    resources.pids().as_ref().map(|pids| pids.limit()).filter(|limit| *limit != 0)
}

fn bytes_or_max(bytes: i64) -> String {
    if bytes < 0 { "max".to_owned() } else { bytes.to_string() }
}

/// v1 shares, 2 to 262144, on v2's scale of 1 to 10000.
fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

/// The number of processors in a list as `0-2,4`.
fn count_of(list: &str) -> Option<usize> {
    list.trim().split(',').try_fold(0usize, |count, range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let first: usize = first.trim().parse().ok()?;
        let last: usize = last.trim().parse().ok()?;
        count.checked_add(last.checked_sub(first)?.checked_add(1)?)
    })
}

fn default_pids() -> u64 {
    let read = |path: &str| fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let threads = read("/proc/sys/kernel/threads-max").unwrap_or(u64::MAX);
    let pids = read("/proc/sys/kernel/pid_max").unwrap_or(32_768);
    threads.min(pids).saturating_sub(RESERVED_PIDS).max(RESERVED_PIDS)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(json: &str) -> Result<Limits, Failure> {
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        Limits::from_spec(Some(&resources), 2)
    }

    fn value(json: &str, file: &str) -> Option<String> {
        let limits = limits(json).expect("honoured");
        limits.settings.into_iter().find(|s| s.file == file).map(|s| s.value)
    }

    #[test]
    fn conversions_are_those_of_runc() {
        let cases = [
            (r#"{"cpu":{"shares":1024}}"#, "cpu.weight", "39"),
            (r#"{"cpu":{"shares":2}}"#, "cpu.weight", "1"),
            (r#"{"cpu":{"shares":262144}}"#, "cpu.weight", "10000"),
            (r#"{"cpu":{"quota":50000}}"#, "cpu.max", "50000 100000"),
            (r#"{"cpu":{"quota":-1,"period":20000}}"#, "cpu.max", "max 20000"),
            (r#"{"memory":{"limit":1000,"swap":1500}}"#, "memory.swap.max", "500"),
            (r#"{"memory":{"limit":-1,"swap":-1}}"#, "memory.max", "max"),
            (r#"{"memory":{"reservation":77}}"#, "memory.low", "77"),
            (r#"{"pids":{"limit":12}}"#, "pids.max", "12"),
            (r#"{"blockIO":{"weight":1000}}"#, "io.weight", "10000"),
            (r#"{"hugepageLimits":[{"pageSize":"2MB","limit":9}]}"#, "hugetlb.2MB.max", "9"),
            (r#"{"unified":{"memory.high":"5"}}"#, "memory.high", "5"),
        ];
        for (json, file, expected) in cases {
            assert_eq!(value(json, file).as_deref(), Some(expected), "{json}");
        }
    }

    #[test]
    fn hosts_processors_become_as_many_of_the_guests() {
        assert_eq!(value(r#"{"cpu":{"cpus":"6"}}"#, "cpuset.cpus").as_deref(), Some("0-0"));
        assert_eq!(value(r#"{"cpu":{"cpus":"4-9,12"}}"#, "cpuset.cpus").as_deref(), Some("0-1"));
        for bad in ["4-", "9-4", "a"] {
            let failure = limits(&format!(r#"{{"cpu":{{"cpus":"{bad}"}}}}"#)).expect_err("refused");
            assert!(failure.message.starts_with("linux.resources.cpu.cpus"));
        }
    }

    #[test]
    fn what_cannot_be_honoured_is_refused_by_name() {
        let cases = [
            (r#"{"memory":{"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
            (r#"{"memory":{"kernel":4096}}"#, "memory.kernel"),
            (r#"{"memory":{"swap":4096}}"#, "memory.swap"),
            (r#"{"cpu":{"realtimeRuntime":1}}"#, "cpu.realtimeRuntime"),
            (
                r#"{"blockIO":{"weightDevice":[{"major":8,"minor":0,"weight":10}]}}"#,
                "blockIO.weightDevice",
            ),
            (r#"{"network":{"classID":1}}"#, "network.classID"),
            (r#"{"rdma":{"mlx":{"hcaHandles":1}}}"#, "rdma"),
            (r#"{"unified":{"../x":"1"}}"#, "unified"),
        ];
        for (json, field) in cases {
            let failure = limits(json).expect_err("refused");
            assert!(failure.message.contains(field), "{}", failure.message);
        }
    }

    #[test]
    fn throttles_are_the_hosts() {
        let throttle = r#"{"blockIO":{"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":1}]}}"#;
        assert_eq!(
            limits(throttle).expect("accepted").settings,
            limits("{}").expect("none").settings
        );
    }

    /// A directory with the files of a cgroup.
    fn cgroup(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("directory");
        for (file, content) in files {
            fs::write(directory.path().join(file), content).expect("file");
        }
        directory
    }

    fn update(cgroup: &Path, json: &str) -> Result<(), Failure> {
        let resources: LinuxResources = serde_json::from_str(json).expect("resources");
        Limits::of_update(&resources, 2, cgroup)?.replace(cgroup)
    }

    #[test]
    fn what_an_update_does_not_name_stays() {
        let files = [
            ("cpu.max", "5000 20000"),
            ("memory.max", "1000"),
            ("pids.max", "7"),
            ("memory.swap.max", "0"),
            ("cpu.weight", "39"),
        ];
        let cases = [
            ("{}", "cpu.max", "5000 20000"),
            (r#"{"cpu":{"quota":9000}}"#, "cpu.max", "9000 20000"),
            (r#"{"cpu":{"period":50000}}"#, "cpu.max", "5000 50000"),
            (r#"{"cpu":{"quota":-1}}"#, "cpu.max", "max 20000"),
            (r#"{"cpu":{"shares":1024}}"#, "cpu.max", "5000 20000"),
            (r#"{"memory":{"swap":1500}}"#, "memory.swap.max", "500"),
            (r#"{"memory":{"limit":2000}}"#, "memory.swap.max", "0"),
            (r#"{"memory":{"limit":2000}}"#, "pids.max", "7"),
            (r#"{"pids":{"limit":0}}"#, "pids.max", "7"),
            (r#"{"pids":{"limit":8}}"#, "pids.max", "8"),
        ];
        for (json, file, expected) in cases {
            let cgroup = cgroup(&files);
            update(cgroup.path(), json).expect("taken");
            let value = fs::read_to_string(cgroup.path().join(file)).expect("file");
            // A plain file keeps what a shorter value doesn't cover.
            assert!(value.starts_with(expected), "{json}: {value}");
        }
    }

    #[test]
    fn update_that_cannot_be_honoured_as_a_whole_changes_nothing() {
        let files = [("memory.max", "5000"), ("memory.current", "3000"), ("cpu.weight", "39")];
        let cases = [
            (r#"{"memory":{"limit":100},"cpu":{"quota":1000}}"#, "cpu.quota"),
            (r#"{"memory":{"limit":100},"cpu":{"shares":2,"cpus":"x"}}"#, "cpu.cpus"),
            (r#"{"memory":{"limit":100,"disableOOMKiller":true}}"#, "memory.disableOOMKiller"),
            (r#"{"memory":{"limit":2999,"checkBeforeUpdate":true}}"#, "memory.limit"),
            (r#"{"memory":{"limit":100},"unified":{"no.file":"1"}}"#, "unified (no.file)"),
        ];
        for (json, field) in cases {
            let cgroup = cgroup(&files);
            let failure = update(cgroup.path(), json).expect_err("refused");
            assert!(failure.message.contains(field), "{json}: {}", failure.message);
            for (file, before) in files {
                let after = fs::read_to_string(cgroup.path().join(file)).expect("file");
                assert_eq!(after, before, "{json}");
            }
        }
        let higher = r#"{"memory":{"limit":3000,"checkBeforeUpdate":true}}"#;
        update(cgroup(&files).path(), higher).expect("taken");
    }

    #[test]
    fn processes_are_always_limited() {
        let limits = Limits::from_spec(None, 1).expect("honoured");
        let pids: u64 = limits.settings[0].value.parse().expect("a number");
        assert!(pids >= RESERVED_PIDS);
        assert_eq!(limits.settings[0].file, "pids.max");
    }
}
