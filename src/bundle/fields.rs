//! The fields of config.json that kiln knows.
//!
//! A field that isn't listed here is refused: ignoring it could drop a limit that the caller relies
//! on. That a field is listed doesn't mean any value of it can be honoured; see
//! [`refusals`](super::refusals) and the agent.

use serde_json::Value;

use super::BundleError;

/// What may stand in a place of the document.
enum Shape {
    /// Anything: a scalar, a list of scalars, or a map whose keys are the caller's.
    Any,
    /// An object with these fields.
    Object(&'static [(&'static str, Shape)]),
    /// A list of such.
    List(&'static Shape),
}

use Shape::{Any, List, Object};

const MAPPINGS: Shape = List(&Object(&[("containerID", Any), ("hostID", Any), ("size", Any)]));

const SECCOMP_ARGS: Shape =
    List(&Object(&[("index", Any), ("value", Any), ("valueTwo", Any), ("op", Any)]));

const SECCOMP: Shape = Object(&[
    ("defaultAction", Any),
    ("defaultErrnoRet", Any),
    ("architectures", Any),
    ("flags", Any),
    ("listenerPath", Any),
    ("listenerMetadata", Any),
    (
        "syscalls",
        List(&Object(&[
            ("name", Any),
            ("names", Any),
            ("action", Any),
            ("errnoRet", Any),
            ("args", SECCOMP_ARGS),
            ("comment", Any),
            ("includes", Any),
            ("excludes", Any),
        ])),
    ),
]);

const CAPABILITIES: Shape = Object(&[
    ("bounding", Any),
    ("effective", Any),
    ("inheritable", Any),
    ("permitted", Any),
    ("ambient", Any),
]);

const SCHEDULER: Shape = Object(&[
    ("policy", Any),
    ("nice", Any),
    ("priority", Any),
    ("flags", Any),
    ("runtime", Any),
    ("deadline", Any),
    ("period", Any),
]);

const PROCESS: Shape = Object(&[
    ("terminal", Any),
    ("consoleSize", Object(&[("height", Any), ("width", Any)])),
    ("user", Object(&[("uid", Any), ("gid", Any), ("umask", Any), ("additionalGids", Any)])),
    ("args", Any),
    ("env", Any),
    ("cwd", Any),
    ("capabilities", CAPABILITIES),
    ("rlimits", List(&Object(&[("type", Any), ("hard", Any), ("soft", Any)]))),
    ("noNewPrivileges", Any),
    ("apparmorProfile", Any),
    ("oomScoreAdj", Any),
    ("scheduler", SCHEDULER),
    ("ioPriority", Object(&[("class", Any), ("priority", Any)])),
    ("selinuxLabel", Any),
]);

const RESOURCES: Shape = Object(&[
    (
        "devices",
        List(&Object(&[
            ("allow", Any),
            ("type", Any),
            ("major", Any),
            ("minor", Any),
            ("access", Any),
        ])),
    ),
    (
        "memory",
        Object(&[
            ("limit", Any),
            ("reservation", Any),
            ("swap", Any),
            ("kernel", Any),
            ("kernelTCP", Any),
            ("swappiness", Any),
            ("disableOOMKiller", Any),
            ("useHierarchy", Any),
            ("checkBeforeUpdate", Any),
        ]),
    ),
    (
        "cpu",
        Object(&[
            ("shares", Any),
            ("quota", Any),
            ("burst", Any),
            ("period", Any),
            ("realtimeRuntime", Any),
            ("realtimePeriod", Any),
            ("cpus", Any),
            ("mems", Any),
            ("idle", Any),
        ]),
    ),
    ("pids", Object(&[("limit", Any)])),
    (
        "blockIO",
        Object(&[
            ("weight", Any),
            ("leafWeight", Any),
            ("weightDevice", Any),
            ("throttleReadBpsDevice", Any),
            ("throttleWriteBpsDevice", Any),
            ("throttleReadIOPSDevice", Any),
            ("throttleWriteIOPSDevice", Any),
        ]),
    ),
    ("hugepageLimits", List(&Object(&[("pageSize", Any), ("limit", Any)]))),
    ("network", Object(&[("classID", Any), ("priorities", Any)])),
    ("rdma", Any),
    ("unified", Any),
]);

const DEVICES: Shape = List(&Object(&[
    ("type", Any),
    ("path", Any),
    ("major", Any),
    ("minor", Any),
    ("fileMode", Any),
    ("uid", Any),
    ("gid", Any),
]));

const LINUX: Shape = Object(&[
    ("uidMappings", MAPPINGS),
    ("gidMappings", MAPPINGS),
    ("sysctl", Any),
    ("resources", RESOURCES),
    ("cgroupsPath", Any),
    ("namespaces", List(&Object(&[("type", Any), ("path", Any)]))),
    ("devices", DEVICES),
    ("seccomp", SECCOMP),
    ("rootfsPropagation", Any),
    ("maskedPaths", Any),
    ("readonlyPaths", Any),
    ("mountLabel", Any),
    ("personality", Object(&[("domain", Any), ("flags", Any)])),
    ("timeOffsets", Any),
]);

const HOOKS: Shape = List(&Object(&[("path", Any), ("args", Any), ("env", Any), ("timeout", Any)]));

const CONFIG: Shape = Object(&[
    ("ociVersion", Any),
    ("process", PROCESS),
    ("root", Object(&[("path", Any), ("readonly", Any)])),
    ("hostname", Any),
    ("domainname", Any),
    (
        "mounts",
        List(&Object(&[("destination", Any), ("type", Any), ("source", Any), ("options", Any)])),
    ),
    (
        "hooks",
        Object(&[
            ("prestart", HOOKS),
            ("createRuntime", HOOKS),
            ("createContainer", HOOKS),
            ("startContainer", HOOKS),
            ("poststart", HOOKS),
            ("poststop", HOOKS),
        ]),
    ),
    ("annotations", Any),
    ("linux", LINUX),
]);

/// Refuses the first field that isn't known.
///
/// # Errors
/// Its path.
pub fn check(config: &Value) -> Result<(), BundleError> {
    refuse(unknown(&CONFIG, config, ""))
}

/// Refuses the first field of a `process` object that isn't known.
///
/// # Errors
/// Its path.
pub fn check_process(process: &Value) -> Result<(), BundleError> {
    refuse(unknown(&PROCESS, process, "process"))
}

/// Refuses the first field of a `linux.resources` object that isn't known.
///
/// # Errors
/// Its path.
pub fn check_resources(resources: &Value) -> Result<(), BundleError> {
    refuse(unknown(&RESOURCES, resources, "linux.resources"))
}

const UNKNOWN: &str = "not supported by kiln: remove it";
/// A list of an object's values, in the order of its fields, is as good to the parser.
const NO_OBJECT: &str = "a list where an object belongs: name its fields";

fn refuse(found: Option<(String, &'static str)>) -> Result<(), BundleError> {
    match found {
        Some((field, reason)) => Err(BundleError::field(field, reason)),
        None => Ok(()),
    }
}

/// The path of the first field below `path` that isn't known, or can't be told, and what is wrong with
/// it. A null stands for an absent field.
fn unknown(shape: &Shape, value: &Value, path: &str) -> Option<(String, &'static str)> {
    match (shape, value) {
        (Object(fields), Value::Object(members)) => members.iter().find_map(|(name, member)| {
            let below = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
            if member.is_null() {
                return None;
            }
            match fields.iter().find(|(known, _)| known == name) {
                Some((_, shape)) => unknown(shape, member, &below),
                None => Some((below, UNKNOWN)),
            }
        }),
        (Object(_), Value::Array(_)) => {
            let path = if path.is_empty() { "config.json" } else { path };
            Some((path.to_owned(), NO_OBJECT))
        }
        (List(shape), Value::Array(items)) => items
            .iter()
            .enumerate()
            .find_map(|(index, item)| unknown(shape, item, &format!("{path}[{index}]"))),
        _ => None,
    }
}
