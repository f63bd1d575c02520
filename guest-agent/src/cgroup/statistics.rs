//! The figures that the kernel keeps for a cgroup (Documentation/admin-guide/cgroup-v2.rst and
//! accounting/psi.rst). What it doesn't keep, or writes in a way that isn't known here, is absent.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use kiln_protocol::Statistics;
use kiln_protocol::statistics::{
    CpuStatistics, DeviceStatistics, MAX_DEVICES, MEMORY_STAT_KEYS, MemoryEvents, MemoryStatistics,
    PidsStatistics, Pressure, Stall,
};

/// Reads all figures of the cgroup at a path.
pub(super) fn read(cgroup: &Path) -> Statistics {
    let text = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap_or_default();
    let number = |file: &str| text(file).trim().parse::<u64>().ok();
    let stat = keyed(&text("memory.stat"));
    Statistics {
        cpu: cpu(&keyed(&text("cpu.stat"))),
        memory: MemoryStatistics {
            current: number("memory.current").unwrap_or(0),
            peak: number("memory.peak"),
            // Without a limit the file says "max".
            limit: number("memory.max"),
            swap_current: number("memory.swap.current"),
            swap_limit: number("memory.swap.max"),
            kernel: stat.get("kernel").copied(),
            events: memory_events(&keyed(&text("memory.events"))),
            stat: known(stat),
        },
        pids: PidsStatistics {
            current: number("pids.current").unwrap_or(0),
            limit: number("pids.max"),
        },
        io: text("io.stat").lines().filter_map(device).take(MAX_DEVICES).collect(),
        cpu_pressure: pressure(&text("cpu.pressure")),
        memory_pressure: pressure(&text("memory.pressure")),
        io_pressure: pressure(&text("io.pressure")),
    }
}

/// A file of lines with a name and a number each.
pub(super) fn keyed(text: &str) -> BTreeMap<String, u64> {
    let pair = |line: &str| {
        let (key, value) = line.split_once(' ')?;
        Some((key.to_owned(), value.trim().parse().ok()?))
    };
    text.lines().filter_map(pair).collect()
}

fn cpu(stat: &BTreeMap<String, u64>) -> CpuStatistics {
    let value = |key: &str| stat.get(key).copied().unwrap_or(0);
    CpuStatistics {
        usage_usec: value("usage_usec"),
        user_usec: value("user_usec"),
        system_usec: value("system_usec"),
        nr_periods: value("nr_periods"),
        nr_throttled: value("nr_throttled"),
        throttled_usec: value("throttled_usec"),
    }
}

fn memory_events(events: &BTreeMap<String, u64>) -> MemoryEvents {
    let value = |key: &str| events.get(key).copied().unwrap_or(0);
    MemoryEvents {
        low: value("low"),
        high: value("high"),
        max: value("max"),
        oom: value("oom"),
        oom_kill: value("oom_kill"),
    }
}

fn known(mut stat: BTreeMap<String, u64>) -> BTreeMap<String, u64> {
    stat.retain(|key, _| MEMORY_STAT_KEYS.contains(&key.as_str()));
    stat
}

/// A line as `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn device(line: &str) -> Option<DeviceStatistics> {
    let (number, figures) = line.split_once(' ')?;
    let (major, minor) = number.split_once(':')?;
    let value = |key: &str| {
        let value = figures.split_whitespace().find_map(|pair| pair.strip_prefix(key))?;
        value.strip_prefix('=')?.parse().ok()
    };
    Some(DeviceStatistics {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
        rbytes: value("rbytes").unwrap_or(0),
        wbytes: value("wbytes").unwrap_or(0),
        rios: value("rios").unwrap_or(0),
        wios: value("wios").unwrap_or(0),
    })
}

fn pressure(text: &str) -> Option<Pressure> {
    let line = |kind: &str| text.lines().find_map(|line| stall(line.strip_prefix(kind)?));
    // Older kernels have no "full" line for processors.
    Some(Pressure { some: line("some ")?, full: line("full ").unwrap_or_default() })
}

/// A line as `avg10=0.12 avg60=0.00 avg300=0.00 total=34`.
fn stall(figures: &str) -> Option<Stall> {
    let value = |key: &str| {
        let value = figures.split_whitespace().find_map(|pair| pair.strip_prefix(key))?;
        value.strip_prefix('=')
    };
    let average = |key: &str| hundredths(value(key)?);
    Some(Stall {
        avg10: average("avg10")?,
        avg60: average("avg60")?,
        avg300: average("avg300")?,
        total: value("total")?.parse().ok()?,
    })
}

/// A percentage with two decimals, in hundredths of a percent.
fn hundredths(percentage: &str) -> Option<u16> {
    let (whole, fraction) = percentage.split_once('.')?;
    if fraction.len() != 2 {
        return None;
    }
    let whole: u16 = whole.parse().ok()?;
    whole.checked_mul(100)?.checked_add(fraction.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn files_of_the_kernel_become_figures() {
        let directory = tempfile::tempdir().expect("directory");
        for (file, content) in [
            ("cpu.stat", "usage_usec 9\nuser_usec 5\nsystem_usec 4\nnr_throttled 2\nnice_usec 1\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.stat", "anon 1\nkernel 77\nno_such_figure_yet 3\n"),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 0\n"),
            ("pids.current", "3\n"),
            ("pids.max", "12\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:1 \n"),
            (
                "memory.pressure",
                "some avg10=0.12 avg60=100.00 avg300=0.00 total=34\n\
                 full avg10=0.00 avg60=0.00 avg300=0.00 total=5\n",
            ),
        ] {
            fs::write(directory.path().join(file), content).expect("file");
        }
        let all = read(directory.path());
        assert_eq!((all.cpu.usage_usec, all.cpu.nr_throttled), (9, 2));
        assert_eq!((all.memory.current, all.memory.limit, all.memory.peak), (4096, None, None));
        assert_eq!(all.memory.kernel, Some(77));
        assert_eq!(all.memory.stat.keys().collect::<Vec<_>>(), ["anon", "kernel"]);
        assert_eq!(all.memory.events.oom_kill, 4);
        assert_eq!(all.pids, PidsStatistics { current: 3, limit: Some(12) });
        assert_eq!((all.io[0].major, all.io[0].wios, all.io[1].minor), (254, 4, 1));
        let memory = all.memory_pressure.expect("kept");
        assert_eq!((memory.some.avg10, memory.some.avg60, memory.full.total), (12, 10_000, 5));
        assert_eq!(all.cpu_pressure, None);
    }

    proptest! {
        #[test]
        fn strange_lines_are_passed_over(text in "[ -~\n]{0,200}") {
            keyed(&text);
            pressure(&text);
            text.lines().filter_map(device).for_each(drop);
        }

        #[test]
        fn percentages_are_exact(hundreds in 0u16..=10_000) {
            let text = format!("{}.{:02}", hundreds / 100, hundreds % 100);
            prop_assert_eq!(hundredths(&text), Some(hundreds));
        }
    }
}
