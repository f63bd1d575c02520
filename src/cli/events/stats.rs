//! A container's figures in the form of runc's `events` (runc's types/events.go and, for how version
//! 2 of cgroups maps to it, libcontainer/cgroups/fs2). What the guest doesn't count stays empty
//! there, as it does under runc on a host that doesn't count it.

use std::collections::BTreeMap;

use kiln_protocol::Statistics;
use kiln_protocol::statistics::{
    CpuStatistics, DeviceStatistics, MemoryEvents, MemoryStatistics, Pressure, Stall,
};
use serde::Serialize;
use serde_json::{Value, json};

/// What runc has for a limit that isn't set.
const NO_LIMIT: u64 = u64::MAX;

/// The data of a `stats` event.
#[derive(Debug, Serialize)]
pub struct Stats {
    cpu: Cpu,
    cpuset: Cpuset,
    memory: Memory,
    pids: Pids,
    blkio: Blkio,
    hugetlb: BTreeMap<String, Value>,
    intel_rdt: BTreeMap<String, Value>,
    network_interfaces: Option<Vec<Value>>,
}

#[derive(Debug, Serialize)]
struct Cpu {
    usage: CpuUsage,
    throttling: Throttling,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Value>,
}

/// In nanoseconds.
#[derive(Debug, Serialize)]
struct CpuUsage {
    #[serde(skip_serializing_if = "is_zero")]
    total: u64,
    kernel: u64,
    user: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Throttling {
    #[serde(skip_serializing_if = "is_zero")]
    periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_periods: u64,
    #[serde(skip_serializing_if = "is_zero")]
    throttled_time: u64,
}

/// Version 2 of cgroups has none of these.
#[derive(Debug, Default, Serialize)]
struct Cpuset {
    cpu_exclusive: u64,
    mem_hardwall: u64,
    mem_exclusive: u64,
    memory_migrate: u64,
    memory_spread_page: u64,
    memory_spread_slab: u64,
    memory_pressure: u64,
    sched_load_balance: u64,
    sched_relax_domain_level: i64,
}

#[derive(Debug, Serialize)]
struct Memory {
    #[serde(skip_serializing_if = "is_zero")]
    cache: u64,
    usage: MemoryEntry,
    swap: MemoryEntry,
    kernel: MemoryEntry,
    #[serde(rename = "kernelTCP")]
    kernel_tcp: MemoryEntry,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    raw: BTreeMap<String, u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Value>,
    event_count: EventCount,
}

#[derive(Debug, Default, Serialize)]
struct MemoryEntry {
    limit: u64,
    #[serde(skip_serializing_if = "is_zero")]
    usage: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    failcnt: u64,
}

#[derive(Debug, Serialize)]
struct EventCount {
    #[serde(skip_serializing_if = "is_zero")]
    low: u64,
    #[serde(skip_serializing_if = "is_zero")]
    high: u64,
    #[serde(skip_serializing_if = "is_zero")]
    max: u64,
    #[serde(skip_serializing_if = "is_zero")]
    oom: u64,
    #[serde(skip_serializing_if = "is_zero")]
    oom_kill: u64,
}

#[derive(Debug, Serialize)]
struct Pids {
    #[serde(skip_serializing_if = "is_zero")]
    current: u64,
    #[serde(skip_serializing_if = "is_zero")]
    limit: u64,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Blkio {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_service_bytes_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    io_serviced_recursive: Vec<BlkioEntry>,
    #[serde(skip_serializing_if = "Option::is_none")]
    psi: Option<Value>,
}

#[derive(Debug, Serialize)]
struct BlkioEntry {
    #[serde(skip_serializing_if = "is_zero")]
    major: u64,
    #[serde(skip_serializing_if = "is_zero")]
    minor: u64,
    op: &'static str,
    #[serde(skip_serializing_if = "is_zero")]
    value: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl From<Statistics> for Stats {
    fn from(figures: Statistics) -> Self {
        let Statistics { cpu, memory, pids, io, cpu_pressure, memory_pressure, io_pressure } =
            figures;
        Self {
            cpu: Cpu::new(cpu, cpu_pressure),
            cpuset: Cpuset::default(),
            memory: Memory::new(memory, memory_pressure),
            pids: Pids { current: pids.current, limit: pids.limit.unwrap_or(0) },
            blkio: Blkio::new(&io, io_pressure),
            hugetlb: BTreeMap::new(),
            intel_rdt: BTreeMap::new(),
            network_interfaces: None,
        }
    }
}

impl Cpu {
    fn new(cpu: CpuStatistics, pressure: Option<Pressure>) -> Self {
        let nanoseconds = |microseconds: u64| microseconds.saturating_mul(1000);
        Self {
            usage: CpuUsage {
                total: nanoseconds(cpu.usage_usec),
                kernel: nanoseconds(cpu.system_usec),
                user: nanoseconds(cpu.user_usec),
            },
            throttling: Throttling {
                periods: cpu.nr_periods,
                throttled_periods: cpu.nr_throttled,
                throttled_time: nanoseconds(cpu.throttled_usec),
            },
            psi: pressure.map(psi),
        }
    }
}

impl Memory {
    fn new(memory: MemoryStatistics, pressure: Option<Pressure>) -> Self {
        let MemoryEvents { low, high, max, oom, oom_kill } = memory.events;
        let limit = memory.limit.unwrap_or(NO_LIMIT);
        // Together with memory, as version 1 of cgroups counts it.
        let swap = MemoryEntry {
            limit: memory.swap_limit.map_or(NO_LIMIT, |swap| swap.saturating_add(limit)),
            usage: memory.swap_current.unwrap_or(0).saturating_add(memory.current),
            ..MemoryEntry::default()
        };
        let peak = memory.peak.unwrap_or(0);
        Self {
            cache: memory.stat.get("file").copied().unwrap_or(0),
            usage: MemoryEntry { limit, usage: memory.current, max: peak, failcnt: 0 },
            swap,
            kernel: MemoryEntry::default(),
            kernel_tcp: MemoryEntry::default(),
            raw: memory.stat,
            psi: pressure.map(psi),
            event_count: EventCount { low, high, max, oom, oom_kill },
        }
    }
}

impl Blkio {
    fn new(devices: &[DeviceStatistics], pressure: Option<Pressure>) -> Self {
        let entries = |read: fn(&DeviceStatistics) -> u64, write: fn(&DeviceStatistics) -> u64| {
            let of_device =
                |device: &DeviceStatistics| {
                    let (major, minor) = (device.major.into(), device.minor.into());
                    [("Read", read(device)), ("Write", write(device))]
                        .map(|(op, value)| BlkioEntry { major, minor, op, value })
                };
            devices.iter().flat_map(of_device).collect()
        };
        Self {
            io_service_bytes_recursive: entries(|device| device.rbytes, |device| device.wbytes),
            io_serviced_recursive: entries(|device| device.rios, |device| device.wios),
            psi: pressure.map(psi),
        }
    }
}

fn psi(Pressure { some, full }: Pressure) -> Value {
    let stall = |Stall { avg10, avg60, avg300, total }: Stall| {
        let percent = |hundredths: u16| f64::from(hundredths) / 100.0;
        json!({
            "avg10": percent(avg10), "avg60": percent(avg60), "avg300": percent(avg300),
            "total": total,
        })
    };
    json!({"some": stall(some), "full": stall(full)})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_where_readers_of_runc_look_for_them() {
        let mut figures = Statistics::default();
        figures.cpu.usage_usec = 30;
        figures.cpu.user_usec = 10;
        figures.cpu.nr_throttled = 2;
        figures.memory.current = 100;
        figures.memory.swap_current = Some(5);
        figures.memory.limit = Some(1000);
        figures.memory.stat.insert("file".to_owned(), 7);
        figures.memory.events.oom_kill = 1;
        figures.pids.current = 3;
        let device = DeviceStatistics { major: 253, rbytes: 8, wios: 1, ..Default::default() };
        figures.io.push(device);
        let some = Stall { avg10: 150, ..Stall::default() };
        figures.cpu_pressure = Some(Pressure { some, ..Pressure::default() });
        let stats = serde_json::to_value(Stats::from(figures)).expect("JSON");
        let expected = json!({
            "cpu": {
                "usage": {"total": 30_000, "kernel": 0, "user": 10_000},
                "throttling": {"throttledPeriods": 2},
                "psi": {
                    "some": {"avg10": 1.5, "avg60": 0.0, "avg300": 0.0, "total": 0},
                    "full": {"avg10": 0.0, "avg60": 0.0, "avg300": 0.0, "total": 0},
                },
            },
            "cpuset": {
                "cpu_exclusive": 0, "mem_hardwall": 0, "mem_exclusive": 0, "memory_migrate": 0,
                "memory_spread_page": 0, "memory_spread_slab": 0, "memory_pressure": 0,
                "sched_load_balance": 0, "sched_relax_domain_level": 0,
            },
            "memory": {
                "cache": 7,
                "usage": {"limit": 1000, "usage": 100, "failcnt": 0},
                "swap": {"limit": u64::MAX, "usage": 105, "failcnt": 0},
                "kernel": {"limit": 0, "failcnt": 0},
                "kernelTCP": {"limit": 0, "failcnt": 0},
                "raw": {"file": 7},
                "event_count": {"oom_kill": 1},
            },
            "pids": {"current": 3},
            "blkio": {
                "ioServiceBytesRecursive": [
                    {"major": 253, "op": "Read", "value": 8}, {"major": 253, "op": "Write"},
                ],
                "ioServicedRecursive": [
                    {"major": 253, "op": "Read"}, {"major": 253, "op": "Write", "value": 1},
                ],
            },
            "hugetlb": {}, "intel_rdt": {}, "network_interfaces": null,
        });
        assert_eq!(stats, expected);
    }
}
