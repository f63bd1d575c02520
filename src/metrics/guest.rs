//! The guest's own figures of its container's cgroup: those of `kiln events`.

use kiln_protocol::Statistics;
use kiln_protocol::statistics::{
    CpuStatistics, DeviceStatistics, MemoryEvents, MemoryStatistics, Pressure,
};

use super::Sandbox;
use super::exposition::Family;
use super::exposition::Kind::{Counter, Gauge};

const CPU: Family = Family {
    name: "kiln_container_cpu_seconds_total",
    kind: Counter,
    help: "Processor time in the guest.",
};
const CPU_PERIODS: Family = Family {
    name: "kiln_container_cpu_periods_total",
    kind: Counter,
    help: "Periods of the CPU quota in which anything ran.",
};
const CPU_THROTTLED_PERIODS: Family = Family {
    name: "kiln_container_cpu_throttled_periods_total",
    kind: Counter,
    help: "Periods in which the CPU quota was used up.",
};
const CPU_THROTTLED: Family = Family {
    name: "kiln_container_cpu_throttled_seconds_total",
    kind: Counter,
    help: "Time for which processes were held back by the CPU quota.",
};
const MEMORY: Family = Family {
    name: "kiln_container_memory_bytes",
    kind: Gauge,
    help: "Memory in use by the container in the guest.",
};
const MEMORY_KIND: Family = Family {
    name: "kiln_container_memory_kind_bytes",
    kind: Gauge,
    help: "Of that, anonymous memory, the page cache, and the kernel's own.",
};
const MEMORY_PEAK: Family = Family {
    name: "kiln_container_memory_peak_bytes",
    kind: Gauge,
    help: "The most memory that was in use.",
};
const MEMORY_LIMIT: Family = Family {
    name: "kiln_container_memory_limit_bytes",
    kind: Gauge,
    help: "The memory limit; absent without one.",
};
const MEMORY_SWAP: Family =
    Family { name: "kiln_container_memory_swap_bytes", kind: Gauge, help: "Swap in use." };
const MEMORY_EVENTS: Family = Family {
    name: "kiln_container_memory_events_total",
    kind: Counter,
    help: "How often memory ran short (memory.events of the guest's cgroup).",
};
const PROCESSES: Family = Family {
    name: "kiln_container_processes",
    kind: Gauge,
    help: "Processes and threads in the container.",
};
const PROCESSES_LIMIT: Family = Family {
    name: "kiln_container_processes_limit",
    kind: Gauge,
    help: "The limit on processes and threads; absent without one.",
};
const IO_BYTES: Family = Family {
    name: "kiln_container_io_bytes_total",
    kind: Counter,
    help: "Bytes read from and written to block devices of the guest.",
};
const IO: Family = Family {
    name: "kiln_container_io_operations_total",
    kind: Counter,
    help: "Reads from and writes to block devices of the guest.",
};
const PRESSURE: Family = Family {
    name: "kiln_container_pressure_seconds_total",
    kind: Counter,
    help: "Time for which some task, or all at once, waited for a resource (PSI).",
};

impl Sandbox<'_> {
    /// Adds all figures.
    pub(super) fn add_figures(&mut self, figures: &Statistics) {
        self.add_cpu(&figures.cpu);
        self.add_memory(&figures.memory);
        self.add(PROCESSES, &[], figures.pids.current);
        self.add_if(PROCESSES_LIMIT, figures.pids.limit);
        figures.io.iter().for_each(|device| self.add_device(device));
        let pressures = [
            ("cpu", figures.cpu_pressure),
            ("memory", figures.memory_pressure),
            ("io", figures.io_pressure),
        ];
        for (resource, pressure) in pressures {
            let Some(Pressure { some, full }) = pressure else { continue };
            for (tasks, stall) in [("some", some), ("full", full)] {
                let labels = [("resource", resource), ("tasks", tasks)];
                self.add(PRESSURE, &labels, seconds(stall.total));
            }
        }
    }

    fn add_cpu(&mut self, cpu: &CpuStatistics) {
        self.add(CPU, &[("mode", "user")], seconds(cpu.user_usec));
        self.add(CPU, &[("mode", "system")], seconds(cpu.system_usec));
        self.add(CPU_PERIODS, &[], cpu.nr_periods);
        self.add(CPU_THROTTLED_PERIODS, &[], cpu.nr_throttled);
        self.add(CPU_THROTTLED, &[], seconds(cpu.throttled_usec));
    }

    fn add_memory(&mut self, memory: &MemoryStatistics) {
        self.add(MEMORY, &[], memory.current);
        for (kind, key) in [("anonymous", "anon"), ("file", "file"), ("kernel", "kernel")] {
            if let Some(&bytes) = memory.stat.get(key) {
                self.add(MEMORY_KIND, &[("kind", kind)], bytes);
            }
        }
        self.add_if(MEMORY_PEAK, memory.peak);
        self.add_if(MEMORY_LIMIT, memory.limit);
        self.add_if(MEMORY_SWAP, memory.swap_current);
        let MemoryEvents { low, high, max, oom, oom_kill } = memory.events;
        let events =
            [("low", low), ("high", high), ("max", max), ("oom", oom), ("oom_kill", oom_kill)];
        for (event, count) in events {
            self.add(MEMORY_EVENTS, &[("event", event)], count);
        }
    }

    fn add_device(&mut self, device: &DeviceStatistics) {
        let name = format!("{}:{}", device.major, device.minor);
        for (operation, bytes, count) in
            [("read", device.rbytes, device.rios), ("write", device.wbytes, device.wios)]
        {
            let labels = [("device", name.as_str()), ("operation", operation)];
            self.add(IO_BYTES, &labels, bytes);
            self.add(IO, &labels, count);
        }
    }

    fn add_if(&mut self, family: Family, value: Option<u64>) {
        if let Some(value) = value {
            self.add(family, &[], value);
        }
    }
}

/// Of microseconds.
fn seconds(microseconds: u64) -> f64 {
    microseconds as f64 / 1e6
}
