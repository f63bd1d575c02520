//! `kiln features`: what kiln honours in a bundle's configuration, in the words of the runtime
//! specification's features structure.
//!
//! What is listed here is what the agent takes; what isn't is refused by name when a container is
//! made.

use std::io::Write;
use std::process::ExitCode;

use capctl::caps::CapSet;
use serde_json::{Value, json};

use super::{Global, SPEC_VERSION};

/// Options of bind mounts and file systems, without those that only a file system itself knows.
/// Those that set an attribute have a recursive form with an `r` before the name.
const ATTRIBUTES: [&str; 15] = [
    "atime",
    "dev",
    "diratime",
    "exec",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "relatime",
    "ro",
    "rw",
];
const MORE_ATTRIBUTES: [&str; 3] = ["strictatime", "suid", "symfollow"];
const PROPAGATIONS: [&str; 4] = ["private", "shared", "slave", "unbindable"];
const OTHERS: [&str; 13] = [
    "async",
    "bind",
    "defaults",
    "dirsync",
    "iversion",
    "lazytime",
    "loud",
    "noiversion",
    "nolazytime",
    "nomand",
    "rbind",
    "silent",
    "sync",
];

/// Options of `kiln features`.
#[derive(Debug, clap::Args)]
pub struct Features {}

/// Prints the structure as JSON.
pub fn run(_: &Global, _: &Features) -> anyhow::Result<ExitCode> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer_pretty(&mut out, &describe())?;
    writeln!(out)?;
    Ok(ExitCode::SUCCESS)
}

fn describe() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": SPEC_VERSION,
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop",
        ],
        "mountOptions": mount_options(),
        "linux": {
            "namespaces": ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"],
            "capabilities": capabilities(),
            // The host's. What a container sees is the guest's: version 2.
            "cgroup": {
                "v1": true, "v2": true, "systemd": true, "systemdUser": true, "rdma": false,
            },
            "seccomp": {
                "enabled": true,
                "actions": [
                    "SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL", "SCMP_ACT_KILL_PROCESS",
                    "SCMP_ACT_KILL_THREAD", "SCMP_ACT_LOG", "SCMP_ACT_TRACE", "SCMP_ACT_TRAP",
                ],
                "operators": [
                    "SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT",
                    "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE",
                ],
                "archs": ["SCMP_ARCH_X86_64"],
                "knownFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV",
                ],
                "supportedFlags": [
                    "SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
                    "SECCOMP_FILTER_FLAG_TSYNC",
                ],
            },
            "apparmor": {"enabled": false},
            "selinux": {"enabled": false},
            "intelRdt": {"enabled": false},
            "mountExtensions": {"idmap": {"enabled": false}},
        },
        "annotations": {
            "io.kiln.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.runc.checkpoint.enabled": "false",
        },
        "potentiallyUnsafeConfigAnnotations": ["io.kiln."],
    })
}

fn mount_options() -> Vec<String> {
    let attributes = || ATTRIBUTES.into_iter().chain(MORE_ATTRIBUTES);
    let recursive = attributes().chain(PROPAGATIONS).map(|name| format!("r{name}"));
    let mut options: Vec<String> = attributes()
        .chain(PROPAGATIONS)
        .chain(OTHERS)
        .chain(["tmpcopyup"])
        .map(str::to_owned)
        .chain(recursive)
        .collect();
    options.sort_unstable();
    options
}

/// The capabilities that the guest's kernel knows.
fn capabilities() -> Vec<String> {
    (!CapSet::empty()).iter().map(|capability| capability.to_string()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structure_is_the_specifications() {
        let parsed: oci_spec::runtime::Features =
            serde_json::from_value(describe()).expect("the specification's structure");
        let linux = parsed.linux().as_ref().expect("linux");
        let capabilities = linux.capabilities().as_ref().expect("capabilities");
        assert!(capabilities.contains(&"CAP_SYS_ADMIN".to_owned()), "{capabilities:?}");
        assert_eq!(capabilities.len(), 41);
    }

    #[test]
    fn each_mount_option_stands_there_once() {
        let options = mount_options();
        let mut once = options.clone();
        once.dedup();
        assert_eq!(options, once);
        assert!(options.contains(&"rro".to_owned()) && options.contains(&"rslave".to_owned()));
    }
}
