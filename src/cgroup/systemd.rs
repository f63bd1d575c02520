//! Scopes that systemd makes, for callers whose cgroups systemd manages.
//!
//! systemd is spoken to by `busctl`, which comes with it and is there whenever it is. It is told of
//! the limits that it knows too, lest it put its own back when it reloads its configuration.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::limits::Setting;
use super::path::Scope;

/// How long systemd may take to move a process into a new scope.
const PATIENCE: Duration = Duration::from_secs(30);
const STEP: Duration = Duration::from_millis(2);

/// Whether systemd runs this host: sd_booted(3).
pub fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Has systemd make a scope with the calling process in it.
///
/// # Errors
/// What systemd says: that it has one of this name already, for instance.
pub fn start(scope: &Scope, description: &str) -> anyhow::Result<()> {
    let pid = std::process::id().to_string();
    let (slice, unit) = (&*scope.slice, &*scope.unit);
    call(&[
        "StartTransientUnit",
        "ssa(sv)a(sa(sv))",
        unit,
        "fail",
        "5",
        "Description",
        "s",
        description,
        "Slice",
        "s",
        slice,
        "Delegate",
        "b",
        "true",
        "DefaultDependencies",
        "b",
        "false",
        "PIDs",
        "au",
        "1",
        &pid,
        "0",
    ])
}

/// Waits until the calling process is in its scope.
///
/// # Errors
/// systemd does not move it.
pub fn await_move(scope: &Scope) -> anyhow::Result<()> {
    let (pid, unit) = (std::process::id(), &scope.unit);
    let path = scope.path();
    let deadline = Instant::now() + PATIENCE;
    while !is_in(&path)? {
        if Instant::now() > deadline {
            bail!("systemd has not moved process {pid} to {unit} within {} s", PATIENCE.as_secs());
        }
        std::thread::sleep(STEP);
    }
    Ok(())
}

/// Tells systemd of the limits of a unit, as far as it has properties for them.
///
/// # Errors
/// What systemd says.
pub fn limit(unit: &str, limits: &[Setting]) -> anyhow::Result<()> {
    let properties: Vec<_> = limits.iter().flat_map(properties).collect();
    if properties.is_empty() {
        return Ok(());
    }
    let count = properties.len().to_string();
    let mut arguments = vec!["SetUnitProperties", "sba(sv)", unit, "true", &count];
    for (name, value) in &properties {
        arguments.extend([name, "t", value]);
    }
    call(&arguments)
}

/// The properties for a limit, and their values: all are unsigned numbers of 64 bits.
fn properties(limit: &Setting) -> Vec<(&'static str, String)> {
    let Some((file, value)) = &limit.v2 else { return Vec::new() };
    let name = match file.as_str() {
        "memory.max" => "MemoryMax",
        "memory.swap.max" => "MemorySwapMax",
        "memory.low" => "MemoryLow",
        "pids.max" => "TasksMax",
        "cpu.weight" => "CPUWeight",
        "cpu.max" => return cpu_time(value).unwrap_or_default(),
        _ => return Vec::new(),
    };
    vec![(name, number(value))]
}

/// systemd has the quota as what it makes in a second, and takes a period that it isn't told for 100 ms.
fn cpu_time(value: &str) -> Option<Vec<(&'static str, String)>> {
    let (quota, period) = value.split_once(' ')?;
    let period: u64 = period.parse().ok()?;
    let a_second = match quota.parse::<u64>() {
        Ok(quota) => quota.checked_mul(1_000_000)?.checked_div(period)?.to_string(),
        Err(_) => number(quota),
    };
    Some(vec![("CPUQuotaPerSecUSec", a_second), ("CPUQuotaPeriodUSec", period.to_string())])
}

/// What has no limit is the greatest number to systemd.
fn number(value: &str) -> String {
    if value == "max" { u64::MAX.to_string() } else { value.to_owned() }
}

/// Has systemd forget a scope. One that it has forgotten already is no error.
pub fn stop(unit: &str) {
    for call_of in [&["StopUnit", "ss", unit, "replace"][..], &["ResetFailedUnit", "s", unit]] {
        if let Err(error) = call(call_of) {
            tracing::debug!(unit, "{error:#}");
        }
    }
}

/// Whether the calling process is in a cgroup of this path, in systemd's hierarchy.
fn is_in(path: &Path) -> anyhow::Result<bool> {
    let own = std::fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
    let ends = |line: &str| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, found) = rest.split_once(':')?;
        let is_systemds = controllers.is_empty() || controllers == "name=systemd";
        Some(is_systemds && Path::new(found) == path)
    };
    Ok(own.lines().any(|line| ends(line) == Some(true)))
}

fn call(arguments: &[&str]) -> anyhow::Result<()> {
    let output = busctl(arguments).output().context("busctl, which comes with systemd")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("systemd ({}): {}", arguments[0], said.trim());
    }
    Ok(())
}

fn busctl(arguments: &[&str]) -> Command {
    let mut busctl = Command::new("busctl");
    if !nix::unistd::geteuid().is_root() {
        busctl.arg("--user");
    }
    // The root slice's name, `-.slice`, is no option.
    busctl.args(["--quiet", "--", "call", "org.freedesktop.systemd1"]);
    busctl.args(["/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager"]);
    busctl.args(arguments).stdin(Stdio::null());
    busctl
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn systemd_is_told_what_it_has_properties_for() {
        let told = |file: &str, value: &str| {
            let v2 = Some((file.to_owned(), value.to_owned()));
            properties(&Setting { field: String::new(), v1: None, v2 })
        };
        let unlimited = u64::MAX.to_string();
        for (file, value, expected) in [
            ("pids.max", "7", ("TasksMax", "7")),
            ("pids.max", "max", ("TasksMax", &*unlimited)),
            ("memory.swap.max", "max", ("MemorySwapMax", &*unlimited)),
            ("cpu.max", "max 100000", ("CPUQuotaPerSecUSec", &*unlimited)),
            ("cpu.max", "75000 50000", ("CPUQuotaPerSecUSec", "1500000")),
        ] {
            let told = told(file, value);
            let (name, value) = told.first().expect("a property");
            assert_eq!((*name, &**value), expected);
        }
        assert_eq!(told("cpu.max", "1 5000")[1], ("CPUQuotaPeriodUSec", "5000".to_owned()));
        for (file, value) in [("cpu.max", "1 0"), ("io.max", "8:0 rbps=1")] {
            assert_eq!(told(file, value), []);
        }
    }

    #[test]
    fn no_argument_is_taken_for_an_option() {
        let busctl = busctl(&["StopUnit", "ss", "-.slice", "replace"]);
        let arguments: Vec<_> =
            busctl.get_args().filter_map(|argument| argument.to_str()).collect();
        let end =
            arguments.iter().position(|argument| *argument == "--").expect("an end of options");
        assert!(arguments[..end].iter().all(|argument| argument.starts_with("--")));
        assert_eq!(arguments[end + 1], "call");
        assert!(arguments[end..].ends_with(&["StopUnit", "ss", "-.slice", "replace"]));
    }
}
