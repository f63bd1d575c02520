//! Fields of config.json that kiln knows but can't honour: each is refused by name, with the reason.

use oci_spec::runtime::{Process, Spec};
use serde_json::Value;

use super::BundleError;

/// Refuses the first field that can't be honoured.
///
/// # Errors
/// Its path, the reason and what to do.
pub fn check(spec: &Spec, raw: &Value) -> Result<(), BundleError> {
    check_version(spec)?;
    check_process(spec)?;
    check_labels(raw)?;
    check_resources(raw)
}

fn check_version(spec: &Spec) -> Result<(), BundleError> {
    if spec.version().split('.').next() == Some("1") {
        return Ok(());
    }
    let reason = format!("version {} is not supported: use 1.x", spec.version());
    Err(BundleError::field("ociVersion", reason))
}

fn check_process(spec: &Spec) -> Result<(), BundleError> {
    match spec.process() {
        Some(process) => check_program(process),
        None => Err(BundleError::field("process", "missing: say what to run")),
    }
}

/// Refuses a process that says too little.
///
/// # Errors
/// The field that says too little.
pub fn check_program(process: &Process) -> Result<(), BundleError> {
    if process.args().as_ref().is_none_or(Vec::is_empty) {
        return Err(BundleError::field("process.args", "empty: name the program to run"));
    }
    if !process.cwd().is_absolute() {
        let reason = format!("{:?} is not an absolute path", process.cwd());
        return Err(BundleError::field("process.cwd", reason));
    }
    Ok(())
}

/// Refuses labels of security modules that the guest's kernel doesn't have.
///
/// # Errors
/// The first of them.
pub fn check_labels(raw: &Value) -> Result<(), BundleError> {
    let labels = [
        ("process", "apparmorProfile", "AppArmor"),
        ("process", "selinuxLabel", "SELinux"),
        ("linux", "mountLabel", "SELinux"),
    ];
    for (parent, name, module) in labels {
        let label = raw[parent][name].as_str().unwrap_or_default();
        let is_none = label.is_empty() || (module, label) == ("AppArmor", "unconfined");
        if !is_none {
            let reason = format!(
                "the guest's kernel has no {module}, so {label:?} cannot be applied: remove it"
            );
            return Err(BundleError::field(format!("{parent}.{name}"), reason));
        }
    }
    Ok(())
}

/// Refuses limits that the guest's cgroup v2 has no counterpart for. Empty objects and zeros set
/// nothing.
///
/// # Errors
/// The first of them.
pub fn check_resources(raw: &Value) -> Result<(), BundleError> {
    let resources = &raw["linux"]["resources"];
    let refused = [
        ("cpu", "realtimeRuntime", "cgroup v2 has no real-time limits"),
        ("cpu", "realtimePeriod", "cgroup v2 has no real-time limits"),
        ("memory", "disableOOMKiller", "cgroup v2 cannot switch the OOM killer off"),
        ("network", "classID", "cgroup v2 has no network classes"),
        ("network", "priorities", "cgroup v2 has no network priorities"),
    ];
    for (parent, name, reason) in refused {
        if is_set(&resources[parent][name]) {
            let field = format!("linux.resources.{parent}.{name}");
            return Err(BundleError::field(field, format!("{reason}: remove it")));
        }
    }
    if is_set(&resources["rdma"]) {
        let reason = "the guest has no RDMA devices: remove it";
        return Err(BundleError::field("linux.resources.rdma", reason));
    }
    Ok(())
}

fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) | Value::String(_) => true,
        Value::Number(number) => number.as_f64() != Some(0.0),
        Value::Array(items) => !items.is_empty(),
        Value::Object(members) => !members.is_empty(),
    }
}
