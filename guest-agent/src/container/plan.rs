//! A container's configuration, read and checked as a whole.

use kiln_protocol::CreateContainer;
use oci_spec::runtime::{Linux, Spec};

use super::hooks::Hooks;
use super::namespaces::Namespaces;
use crate::cgroup::{Limits, devices};
use crate::failure::{During, Failure};
use crate::process::sysctl::{self, Sysctls};
use crate::process::{ProcessPlan, scheduling};
use crate::rootfs::RootfsPlan;
use crate::seccomp::{self, Filter, Profile};
use kiln_protocol::FailurePhase;

/// Everything that a container is to be.
#[derive(Debug)]
pub struct Plan {
    /// Namespaces.
    pub namespaces: Namespaces,
    /// Files.
    pub rootfs: RootfsPlan,
    /// The first process.
    pub process: ProcessPlan,
    /// Control group.
    pub limits: Limits,
    /// Devices that its processes may use.
    pub devices: devices::Program,
    /// System calls.
    pub seccomp: Option<Filter>,
    /// Kernel parameters.
    pub sysctls: Sysctls,
    /// Host name.
    pub hostname: Option<String>,
    /// NIS domain name.
    pub domainname: Option<String>,
    /// Hooks that run in the container.
    pub hooks: Hooks,
}

impl Plan {
    /// Reads a configuration. `cpus` is the guest's number of processors.
    ///
    /// # Errors
    /// A configuration that is malformed or asks for what can't be done, by field.
    pub fn new(create: &CreateContainer, cpus: usize) -> Result<Self, Failure> {
        let spec: Spec = serde_json::from_str(create.config.get())
            .during(FailurePhase::Config, || "config.json")?;
        let linux = spec.linux().as_ref();
        linux.map_or(Ok(()), refuse_in_linux)?;
        let process = spec.process().as_ref();
        let process =
            process.ok_or_else(|| Failure::config("process: missing, there is nothing to run"))?;
        let personality = linux.and_then(|linux| linux.personality().as_ref());
        let personality = personality.map(scheduling::personality).transpose()?;
        let process = ProcessPlan::from_spec(process, &create.stdio, personality)?;
        let namespaces = Namespaces::from_spec(linux, create.joined.as_ref())?;
        let hostname = spec.hostname().clone().filter(|name| !name.is_empty());
        let domainname = spec.domainname().clone().filter(|name| !name.is_empty());
        if (hostname.is_some() || domainname.is_some()) && !namespaces.uts {
            return Err(Failure::config("hostname, domainname: need a UTS namespace"));
        }
        let profile = linux.and_then(|linux| linux.seccomp().as_ref());
        let profile = profile.map(Profile::from_spec).transpose()?;
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let device_rules = resources.and_then(|resources| resources.devices().as_ref());
        let sysctls = linux.and_then(|linux| linux.sysctl().as_ref());
        Ok(Self {
            rootfs: RootfsPlan::from_spec(&spec, create, &process.cwd, process.terminal)?,
            limits: Limits::from_spec(resources, cpus)?,
            devices: devices::compile(device_rules.map_or(&[][..], Vec::as_slice))?,
            seccomp: profile.as_ref().map(seccomp::compile).transpose()?,
            sysctls: sysctl::from_spec(sysctls.into_iter().flatten())?,
            namespaces,
            process,
            hostname,
            domainname,
            hooks: Hooks::from_spec(spec.hooks().as_ref(), create.state.get())?,
        })
    }
}

fn refuse_in_linux(linux: &Linux) -> Result<(), Failure> {
    let label = linux.mount_label().as_ref().is_some_and(|label| !label.is_empty());
    let devices = linux.net_devices().as_ref().is_some_and(|devices| !devices.is_empty());
    let refused = [
        (linux.intel_rdt().is_some(), "intelRdt", "the guest's processors have no such control"),
        (linux.memory_policy().is_some(), "memoryPolicy", "the guest has one memory node"),
        (devices, "netDevices", "the host's interfaces are not in the guest"),
        (label, "mountLabel", "the guest's kernel has no SELinux"),
    ];
    match refused.iter().find(|(refused, ..)| *refused) {
        Some((_, field, why)) => Err(Failure::config(format!("linux.{field}: {why}"))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kiln_protocol::{BindMount, Stdio};
    use proptest::prelude::*;
    use serde_json::{Value, json};

    fn config() -> Value {
        json!({
            "ociVersion": "1.2.0",
            "process": {
                "args": ["/bin/true"], "cwd": "/", "env": ["A=b"],
                "user": {"uid": 0, "gid": 0, "additionalGids": [1], "umask": 18},
                "capabilities": {"bounding": ["CAP_KILL"]},
                "rlimits": [{"type": "RLIMIT_CPU", "soft": 1, "hard": 2}],
                "scheduler": {"policy": "SCHED_RR", "priority": 1},
                "ioPriority": {"class": "IOPRIO_CLASS_RT", "priority": 1},
            },
            "root": {"path": "rootfs", "readonly": true},
            "hooks": {"startContainer": [
                {"path": "/bin/x", "args": ["x"], "env": ["A=b"], "timeout": 3},
            ]},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/x", "type": "bind", "source": "/y", "options": ["rbind", "ro"]},
            ],
            "linux": {
                "namespaces": [{"type": "user"}, {"type": "time"}],
                "uidMappings": [{"containerID": 0, "hostID": 9, "size": 5}],
                "gidMappings": [{"containerID": 0, "hostID": 9, "size": 5}],
                "timeOffsets": {"boottime": {"secs": 1, "nanosecs": 2}},
                "devices": [{"path": "/dev/x", "type": "c", "major": 1, "minor": 3}],
                "sysctl": {"net.x": "1"},
                "personality": {"domain": "LINUX"},
                "resources": {
                    "memory": {"limit": 1, "swap": 2}, "pids": {"limit": 1},
                    "cpu": {"shares": 2, "quota": 1, "period": 1, "cpus": "0-1"},
                    "blockIO": {"weight": 10},
                },
                "seccomp": {
                    "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
                    "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW",
                        "args": [{"index": 0, "value": 1, "valueTwo": 2, "op": "SCMP_CMP_EQ"}]}],
                },
            },
        })
    }

    fn plan(config: &Value) -> Result<Plan, Failure> {
        let create = CreateContainer {
            container: "c".to_owned(),
            config: serde_json::value::to_raw_value(config).expect("JSON"),
            state: serde_json::value::to_raw_value(&json!({})).expect("JSON"),
            rootfs: "rootfs".to_owned(),
            binds: vec![BindMount { mount: 1, path: "mounts/1".to_owned(), is_file: false }],
            joined: None,
            stdio: Stdio::Pipes { stdin: None, stdout: None, stderr: None },
        };
        Plan::new(&create, 2)
    }

    /// Pointers to every value of a document.
    fn pointers(value: &Value, at: String, all: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                fields.iter().for_each(|(name, value)| pointers(value, format!("{at}/{name}"), all))
            }
            Value::Array(items) => items
                .iter()
                .enumerate()
                .for_each(|(index, value)| pointers(value, format!("{at}/{index}"), all)),
            _ => {}
        }
        all.push(at);
    }

    #[test]
    fn the_configuration_that_is_spoilt_below_is_a_good_one() {
        plan(&config()).expect("honoured");
    }

    #[test]
    fn terminal_and_stdio_must_agree() {
        let mut config = config();
        config["process"]["terminal"] = json!(true);
        let failure = plan(&config).expect_err("refused");
        assert!(failure.message.starts_with("process.terminal"), "{}", failure.message);
    }

    fn spoilers() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            ".{0,20}".prop_map(Value::from),
            Just(json!([])),
            Just(json!({})),
            Just(json!(["", "\u{0}", "rro", "a=b"])),
        ]
    }

    proptest! {
        #[test]
        fn spoilt_configuration_is_refused_or_honoured_without_a_panic(
            spots in prop::collection::vec((any::<prop::sample::Index>(), spoilers()), 1..4),
        ) {
            let mut config = config();
            for (spot, spoiler) in spots {
                let mut all = Vec::new();
                pointers(&config, String::new(), &mut all);
                if let Some(value) = config.pointer_mut(spot.get::<String>(&all)) {
                    *value = spoiler;
                }
            }
            if let Err(failure) = plan(&config) {
                prop_assert_eq!(failure.phase, FailurePhase::Config);
                prop_assert!(!failure.message.is_empty());
            }
        }
    }
}
