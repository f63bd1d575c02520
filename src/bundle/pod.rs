//! A container's part in a Kubernetes pod, as containerd and CRI-O say it in annotations.
//!
//! They make a container of its own for the pod as a whole, the sandbox, and then the pod's containers,
//! each of which names it. A sandbox is a machine of kiln's; the pod's other containers are set up in
//! the same machine, in its network, IPC and UTS namespaces, and where a path of `linux.namespaces` says
//! so in the PID namespace of the sandbox or of another of them. With `io.kiln.machine` set to
//! `container`, a container has a machine of its own all the same, as if it were in no pod.

use std::path::Path;

use oci_spec::runtime::{LinuxNamespace, LinuxNamespaceType, Spec};
use serde_json::Value;

use super::{BundleError, id};

/// What is shared by whom: `pod`, which is the default, or `container`.
const MACHINE: &str = "io.kiln.machine";

/// The annotations of one caller: a container's part, and its sandbox's id.
const CALLERS: [(&str, &str); 2] = [
    ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-id"),
    ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.cri-o.SandboxID"),
];

/// containerd's sums of what the containers of a pod are limited to.
const MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const CPU_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const CPU_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
const CPU_SHARES: &str = "io.kubernetes.cri.sandbox-cpu-shares";

/// CRI-O's.
const RESOURCES: &str = "io.kubernetes.cri-o.PodLinuxResources";

/// A container's part in a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Its machine is the pod's.
    Sandbox,
    /// It is set up in the machine of a sandbox.
    Container {
        /// The sandbox's id.
        sandbox: String,
        /// The annotation that says so.
        annotation: &'static str,
    },
}

/// What the containers of a pod may take, as far as its sandbox's annotations say it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// CPUs, rounded up.
    pub cpus: Option<u64>,
    /// Memory in bytes.
    pub memory: Option<u64>,
}

/// Finds a container's part.
///
/// # Errors
/// An annotation that can't be, or one of its namespaces that can't be shared within a pod.
pub fn find(spec: &Spec) -> Result<Option<Part>, BundleError> {
    match annotation(spec, MACHINE) {
        None | Some("pod") => {}
        Some("container") => return Ok(None),
        Some(other) => {
            let reason = format!("{other:?} is neither \"pod\" nor \"container\"");
            return Err(refuse(MACHINE, reason));
        }
    }
    for (kind, sandbox) in CALLERS {
        match annotation(spec, kind) {
            None => {}
            Some("sandbox") => return Ok(Some(Part::Sandbox)),
            Some("container") => {
                let found = annotation(spec, sandbox).unwrap_or_default();
                if id::validate(found).is_err() {
                    return Err(refuse(sandbox, format!("{found:?} is no container's id")));
                }
                check_namespaces(spec)?;
                return Ok(Some(Part::Container {
                    sandbox: found.to_owned(),
                    annotation: sandbox,
                }));
            }
            Some(other) => {
                let reason = format!("{other:?} is neither \"sandbox\" nor \"container\"");
                return Err(refuse(kind, reason));
            }
        }
    }
    Ok(None)
}

/// Whether a container is the sandbox of a pod whose other containers have machines of their own. The
/// pod's network is for those.
pub fn leaves_network(spec: &Spec) -> bool {
    annotation(spec, MACHINE) == Some("container")
        && CALLERS.iter().any(|(kind, _)| annotation(spec, kind) == Some("sandbox"))
}

fn check_namespaces(spec: &Spec) -> Result<(), BundleError> {
    for (index, namespace) in namespaces(spec).enumerate() {
        let field = format!("linux.namespaces[{index}]");
        if namespace.typ() == LinuxNamespaceType::User {
            let reason =
                "a container of a pod has the users of its sandbox: leave the user namespace out";
            return Err(BundleError::field(field, reason));
        }
        if let Some(path) = path_of_processes(namespace)
            && process_of(path).is_none()
        {
            let reason = format!(
                "{} names no container of the pod: give it as /proc/PID/ns/pid, with the process id that \
                 kiln gave for it",
                path.display()
            );
            return Err(BundleError::field(field + ".path", reason));
        }
    }
    Ok(())
}

/// The process that stands for the container whose PID namespace a container of a pod is to live in, if
/// that is not to be its own.
pub fn processes_of(spec: &Spec) -> Option<i32> {
    namespaces(spec).find_map(|namespace| process_of(path_of_processes(namespace)?))
}

fn namespaces(spec: &Spec) -> impl Iterator<Item = &LinuxNamespace> {
    let linux = spec.linux().as_ref();
    linux.and_then(|linux| linux.namespaces().as_ref()).into_iter().flatten()
}

fn path_of_processes(namespace: &LinuxNamespace) -> Option<&Path> {
    let path = namespace.path().as_deref().filter(|path| !path.as_os_str().is_empty())?;
    (namespace.typ() == LinuxNamespaceType::Pid).then_some(path)
}

/// All containers of kiln's stand in one PID namespace of the host: which of them is meant, the path
/// says only by its words.
fn process_of(path: &Path) -> Option<i32> {
    path.to_str()?
        .strip_prefix("/proc/")?
        .strip_suffix("/ns/pid")?
        .parse()
        .ok()
        .filter(|pid| *pid > 0)
}

/// What the annotations of a sandbox say of its pod's limits. What is not said, or makes no sense, is
/// no limit.
pub fn sum(spec: &Spec) -> Sum {
    let resources = annotation(spec, RESOURCES).and_then(|text| serde_json::from_str(text).ok());
    let resources: Value = resources.unwrap_or_default();
    let number = |name, field: &str| {
        let said = annotation(spec, name).and_then(|text| text.parse::<i64>().ok());
        let said = said.or_else(|| resources[field].as_i64());
        said.and_then(|number| u64::try_from(number).ok()).filter(|number| *number > 0)
    };
    let quota = number(CPU_QUOTA, "cpu_quota")
        .map(|quota| quota.div_ceil(number(CPU_PERIOD, "cpu_period").unwrap_or(100_000)));
    // 1024 shares are the weight of one CPU: at least so many are asked for.
    let shares = number(CPU_SHARES, "cpu_shares").map(|shares| shares.div_ceil(1024));
    let many = shares.filter(|cpus| *cpus > u64::from(super::sizing::DEFAULT_CPUS));
    Sum { cpus: quota.or(many), memory: number(MEMORY, "memory_limit_in_bytes") }
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str)
}

fn refuse(annotation: &str, reason: String) -> BundleError {
    BundleError::field(format!("annotations[{annotation:?}]"), reason)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn spec(annotations: Value) -> Spec {
        let spec = json!({"ociVersion": "1.0.2", "annotations": annotations});
        serde_json::from_value(spec).expect("spec")
    }

    #[test]
    fn parts_are_those_that_containerd_and_cri_o_name() {
        for (kind, sandbox) in CALLERS {
            assert_eq!(find(&spec(json!({kind: "sandbox"}))).expect("fine"), Some(Part::Sandbox));
            let part = find(&spec(json!({kind: "container", sandbox: "abc"}))).expect("fine");
            let expected = Part::Container { sandbox: "abc".to_owned(), annotation: sandbox };
            assert_eq!(part, Some(expected));
            let own = json!({kind: "container", sandbox: "abc", MACHINE: "container"});
            assert_eq!(find(&spec(own.clone())).expect("fine"), None);
            assert!(
                !leaves_network(&spec(own)) && !leaves_network(&spec(json!({kind: "sandbox"})))
            );
            assert!(leaves_network(&spec(json!({kind: "sandbox", MACHINE: "container"}))));
        }
        assert_eq!(find(&spec(json!({"other": "container"}))).expect("fine"), None);
    }

    #[test]
    fn annotations_that_make_no_sense_are_refused_by_name() {
        let (kind, sandbox) = CALLERS[0];
        for (annotations, named) in [
            (json!({kind: "pod"}), kind),
            (json!({kind: "container"}), sandbox),
            (json!({kind: "container", sandbox: "../x"}), sandbox),
            (json!({MACHINE: "none"}), MACHINE),
        ] {
            let error = find(&spec(annotations)).expect_err("refused").to_string();
            assert!(error.starts_with(&format!("annotations[{named:?}]: ")), "{error}");
        }
    }

    #[test]
    fn namespaces_that_containers_of_a_pod_cannot_share_are_refused() {
        for (namespace, words) in [
            (json!({"type": "pid", "path": "/proc/self/ns/pid"}), "no container of the pod"),
            (json!({"type": "pid", "path": "/run/ns/1"}), "no container of the pod"),
            (json!({"type": "user"}), "users of its sandbox"),
        ] {
            let error = find(&container(&namespace)).expect_err("refused").to_string();
            assert!(error.starts_with("linux.namespaces[1]") && error.contains(words), "{error}");
        }
    }

    #[test]
    fn container_whose_processes_are_shared_is_named_by_its_process() {
        let of = |path: &str| processes_of(&container(&json!({"type": "pid", "path": path})));
        assert_eq!((of("/proc/42/ns/pid"), of(""), of("/proc/-1/ns/pid")), (Some(42), None, None));
    }

    fn container(namespace: &Value) -> Spec {
        let spec = json!({
            "ociVersion": "1.0.2",
            "annotations": {CALLERS[0].0: "container", CALLERS[0].1: "abc"},
            "linux": {"namespaces": [{"type": "mount"}, namespace]},
        });
        serde_json::from_value(spec).expect("spec")
    }

    #[test]
    fn limits_of_a_pod_are_read_from_either_callers_annotations() {
        let containerd = json!({
            MEMORY: "536870912", CPU_QUOTA: "250000", CPU_PERIOD: "100000", CPU_SHARES: "2",
        });
        let expected = Sum { cpus: Some(3), memory: Some(512 << 20) };
        assert_eq!(sum(&spec(containerd)), expected);
        let cri_o = json!({
            "cpu_quota": 250_000, "cpu_period": 100_000, "memory_limit_in_bytes": 512 << 20,
        });
        assert_eq!(sum(&spec(json!({RESOURCES: cri_o.to_string()}))), expected);
        let shares = |shares: &str| sum(&spec(json!({CPU_SHARES: shares}))).cpus;
        assert_eq!((shares("2"), shares("2048"), shares("4000")), (None, None, Some(4)));
        let unlimited = json!({MEMORY: "0", CPU_QUOTA: "-1", RESOURCES: "no JSON"});
        assert_eq!(sum(&spec(unlimited)), Sum::default());
    }
}
