//! What sandboxes take and how they are, for Prometheus.
//!
//! * [`survey`]: asks their monitors, for a bounded time.
//! * [`guest`]: what the guests count.
//! * [`exposition`]: the text format.
//!
//! Of a sandbox that doesn't answer there is what the host knows: that it is not
//! [up](UP), and what its processes take.

mod exposition;
mod guest;
mod survey;

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use self::exposition::Kind::{Counter, Gauge};
use self::exposition::{Exposition, Family, Value};
pub use self::survey::Answers;
use crate::procfs;
use crate::sandbox::host_processes::Snapshot;
use crate::sandbox::inspection::Inspection;
use crate::state::{Container, Monitor, Status};

const BUILD: Family = Family {
    name: "kiln_build_info",
    kind: Gauge,
    help: "The version of kiln that says this, and of its protocol with guests.",
};
const CONTAINERS: Family =
    Family { name: "kiln_containers", kind: Gauge, help: "Containers by status." };
const INFO: Family = Family {
    name: "kiln_container_info",
    kind: Gauge,
    help: "A container, its engine and its status.",
};
const UP: Family = Family {
    name: "kiln_container_up",
    kind: Gauge,
    help: "Whether a container that has not stopped answers: its monitor, and its guest once that \
           is set up.",
};
const UPTIME: Family = Family {
    name: "kiln_container_uptime_seconds",
    kind: Gauge,
    help: "Time since the sandbox's monitor was started.",
};
const PHASE: Family = Family {
    name: "kiln_container_phase_seconds",
    kind: Gauge,
    help: "How long a phase took that is over.",
};
const PROCESS_MEMORY: Family = Family {
    name: "kiln_process_memory_bytes",
    kind: Gauge,
    help: "Memory of a sandbox's process on the host, what is shared divided by the number of \
           processes that share it (PSS).",
};
const PROCESS_CPU: Family = Family {
    name: "kiln_process_cpu_seconds_total",
    kind: Counter,
    help: "Processor time of a sandbox's process on the host.",
};

const STATUSES: [Status; 5] =
    [Status::Creating, Status::Created, Status::Running, Status::Paused, Status::Stopped];

/// Everything about these containers, in the text format. It takes a few seconds at most, however
/// many of them don't answer.
///
/// # Errors
/// There is no `/proc`.
pub fn collect(containers: &[Container]) -> std::io::Result<Exposition> {
    expose(containers, survey::ask_all(containers))
}

/// What a sandbox answers, within a few seconds; `None` if it has stopped.
pub fn ask(container: &Container) -> Option<Answers> {
    survey::ask_all(std::slice::from_ref(container)).pop().flatten()
}

/// The metrics of containers that have answered this.
///
/// # Errors
/// There is no `/proc`.
pub fn expose(
    containers: &[Container],
    answers: Vec<Option<Answers>>,
) -> std::io::Result<Exposition> {
    let mut exposition = Exposition::default();
    let protocol = kiln_protocol::VERSION.to_string();
    let build = [("version", env!("CARGO_PKG_VERSION")), ("protocol", &protocol)];
    exposition.add(BUILD, &build, 1u64);
    for status in STATUSES {
        let count = containers.iter().filter(|container| container.status() == status).count();
        exposition.add(CONTAINERS, &[("status", status.name())], count as u64);
    }
    let processes = Snapshot::take()?;
    for (container, answers) in containers.iter().zip(answers) {
        let mut sandbox = Sandbox { container, exposition: &mut exposition };
        sandbox.add(INFO, &[("status", container.status().name())], 1u64);
        if let Some(answers) = answers {
            sandbox.add_answers(&answers);
            let execs = answers.inspection.map(|inspection| inspection.execs).unwrap_or_default();
            sandbox.add_processes(&processes, &execs);
        } else if let Some(end) = &container.record.end {
            sandbox.add_phases(&end.inspection);
        }
    }
    Ok(exposition)
}

/// One sandbox, to whose metrics its labels are added.
struct Sandbox<'a> {
    container: &'a Container,
    exposition: &'a mut Exposition,
}

impl Sandbox<'_> {
    fn add(&mut self, family: Family, labels: &[(&str, &str)], value: impl Into<Value>) {
        let record = &self.container.record;
        let own = [("id", record.id.as_str()), ("engine", record.engine.as_str())];
        self.exposition.add(family, &[&own[..], labels].concat(), value);
    }

    fn add_answers(&mut self, answers: &Answers) {
        let is_made = self.container.record.status != Status::Creating;
        let is_up = match is_made {
            true => answers.figures.is_ok(),
            false => answers.inspection.is_ok(),
        };
        self.add(UP, &[], u64::from(is_up));
        let id = &self.container.record.id;
        match &answers.figures {
            Ok(figures) => self.add_figures(figures),
            Err(error) if is_made => tracing::warn!(id, "no figures: {error:#}"),
            Err(_) => {}
        }
        if let Ok(inspection) = &answers.inspection {
            self.add_phases(inspection);
        }
        if let Some(uptime) = age(self.container.record.monitor) {
            self.add(UPTIME, &[], uptime.as_secs_f64());
        }
    }

    fn add_phases(&mut self, inspection: &Inspection) {
        for phase in &inspection.passed {
            self.add(PHASE, &[("phase", &phase.name)], phase.seconds);
        }
    }

    fn add_processes(&mut self, processes: &Snapshot, execs: &[i32]) {
        let ticks = procfs::ticks_per_second() as f64;
        for process in processes.of(self.container.record.monitor, execs) {
            let pid = process.pid.to_string();
            let labels = [("role", process.role), ("pid", pid.as_str())];
            let cpu = process.stat.user.saturating_add(process.stat.system);
            self.add(PROCESS_CPU, &labels, cpu as f64 / ticks);
            if let Some(bytes) = procfs::proportional_memory(process.pid) {
                self.add(PROCESS_MEMORY, &labels, bytes);
            }
        }
    }
}

/// How long ago a process was started.
fn age(monitor: Monitor) -> Option<Duration> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_BOOTTIME).ok()?);
    let started = monitor.started as f64 / procfs::ticks_per_second() as f64;
    now.checked_sub(Duration::try_from_secs_f64(started).ok()?)
}
