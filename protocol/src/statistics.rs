//! The figures of a container's control group (Documentation/admin-guide/cgroup-v2.rst of the
//! kernel). A figure that the guest's kernel doesn't keep is absent.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::bounded;

/// Devices in [`Statistics::io`].
pub const MAX_DEVICES: usize = 64;

/// All figures of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Processors.
    pub cpu: CpuStatistics,
    /// Memory.
    pub memory: MemoryStatistics,
    /// Processes.
    pub pids: PidsStatistics,
    /// Block devices, by number; at most [`MAX_DEVICES`].
    #[serde(deserialize_with = "bounded::list::<_, _, MAX_DEVICES>")]
    pub io: Vec<DeviceStatistics>,
    /// Time lost for want of processors.
    pub cpu_pressure: Option<Pressure>,
    /// Time lost for want of memory.
    pub memory_pressure: Option<Pressure>,
    /// Time lost for want of block input and output.
    pub io_pressure: Option<Pressure>,
}

/// cpu.stat; times in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuStatistics {
    /// Processor time.
    pub usage_usec: u64,
    /// Of that, in user mode.
    pub user_usec: u64,
    /// Of that, in the kernel.
    pub system_usec: u64,
    /// Periods of the quota in which anything ran.
    pub nr_periods: u64,
    /// Periods in which the quota was used up.
    pub nr_throttled: u64,
    /// Time for which processes were held back by the quota.
    pub throttled_usec: u64,
}

/// Memory, in bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryStatistics {
    /// memory.current.
    pub current: u64,
    /// memory.peak.
    pub peak: Option<u64>,
    /// memory.max; absent without a limit.
    pub limit: Option<u64>,
    /// memory.swap.current.
    pub swap_current: Option<u64>,
    /// memory.swap.max; absent without a limit.
    pub swap_limit: Option<u64>,
    /// The kernel's own on behalf of the container (`kernel` of memory.stat).
    pub kernel: Option<u64>,
    /// memory.events.
    pub events: MemoryEvents,
    /// memory.stat, under the names in [`MEMORY_STAT_KEYS`].
    #[serde(deserialize_with = "bounded::memory_stat")]
    pub stat: BTreeMap<String, u64>,
}

/// How often memory ran short (memory.events).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryEvents {
    /// Reclaimed below memory.low.
    pub low: u64,
    /// Throttled at memory.high.
    pub high: u64,
    /// About to go beyond memory.max.
    pub max: u64,
    /// At the limit with nothing to reclaim.
    pub oom: u64,
    /// Processes killed.
    pub oom_kill: u64,
}

/// Processes and threads.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PidsStatistics {
    /// pids.current.
    pub current: u64,
    /// pids.max; absent without a limit.
    pub limit: Option<u64>,
}

/// A device's line of io.stat.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceStatistics {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Bytes read.
    pub rbytes: u64,
    /// Bytes written.
    pub wbytes: u64,
    /// Reads.
    pub rios: u64,
    /// Writes.
    pub wios: u64,
}

/// A pressure file (Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pressure {
    /// Some task was held up.
    pub some: Stall,
    /// All tasks were held up at once.
    pub full: Stall,
}

/// Time that was lost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stall {
    /// Share of the last 10 seconds, in hundredths of a percent.
    pub avg10: u16,
    /// Of the last minute.
    pub avg60: u16,
    /// Of the last five minutes.
    pub avg300: u16,
    /// In all, in microseconds.
    pub total: u64,
}

/// The names in memory.stat of Linux 6.18 and before.
pub const MEMORY_STAT_KEYS: &[&str] = &[
    "anon",
    "file",
    "kernel",
    "kernel_stack",
    "pagetables",
    "sec_pagetables",
    "percpu",
    "sock",
    "vmalloc",
    "shmem",
    "zswap",
    "zswapped",
    "file_mapped",
    "file_dirty",
    "file_writeback",
    "swapcached",
    "anon_thp",
    "file_thp",
    "shmem_thp",
    "inactive_anon",
    "active_anon",
    "inactive_file",
    "active_file",
    "unevictable",
    "slab_reclaimable",
    "slab_unreclaimable",
    "slab",
    "workingset_refault_anon",
    "workingset_refault_file",
    "workingset_activate_anon",
    "workingset_activate_file",
    "workingset_restore_anon",
    "workingset_restore_file",
    "workingset_nodereclaim",
    "pgdemote_kswapd",
    "pgdemote_direct",
    "pgdemote_khugepaged",
    "pgdemote_proactive",
    "pgpromote_success",
    "pgscan",
    "pgsteal",
    "pswpin",
    "pswpout",
    "pgscan_kswapd",
    "pgscan_direct",
    "pgscan_khugepaged",
    "pgscan_proactive",
    "pgsteal_kswapd",
    "pgsteal_direct",
    "pgsteal_khugepaged",
    "pgsteal_proactive",
    "pgfault",
    "pgmajfault",
    "pgrefill",
    "pgactivate",
    "pgdeactivate",
    "pglazyfree",
    "pglazyfreed",
    "swpin_zero",
    "swpout_zero",
    "zswpin",
    "zswpout",
    "zswpwb",
    "thp_fault_alloc",
    "thp_collapse_alloc",
    "thp_swpout",
    "thp_swpout_fallback",
    "numa_pages_migrated",
    "numa_pte_updates",
    "numa_hint_faults",
    "numa_task_migrated",
    "numa_task_swapped",
    "hugetlb",
];
