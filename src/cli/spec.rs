//! `kiln spec`: a config.json to begin with.

use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use serde_json::{Value, json};

/// Options of `kiln spec`.
#[derive(Debug, clap::Args)]
pub struct Spec {
    /// The bundle's directory
    #[arg(short, long, value_name = "DIR", default_value = ".")]
    bundle: PathBuf,
    /// Write the configuration for a caller who isn't root: a user namespace that maps the caller
    #[arg(long)]
    rootless: bool,
}

const NAME: &str = "config.json";

/// Writes the file; one that is there already is left as it is, and is an error.
pub fn run(spec: &Spec) -> anyhow::Result<ExitCode> {
    let path = spec.bundle.join(NAME);
    let mut config = default_config();
    if spec.rootless {
        make_rootless(&mut config);
    }
    let mut text = serde_json::to_string_pretty(&config)?;
    text.push('\n');
    let file = std::fs::OpenOptions::new().write(true).create_new(true).open(&path);
    let mut file = match file {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
            bail!("file {NAME} exists in {}: remove it first", spec.bundle.display());
        }
        Err(error) => return Err(error).with_context(|| path.display().to_string()),
    };
    file.write_all(text.as_bytes()).with_context(|| path.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    match options {
        [] => json!({"destination": destination, "type": kind, "source": source}),
        _ => {
            json!({"destination": destination, "type": kind, "source": source, "options": options})
        }
    }
}

fn default_config() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": super::SPEC_VERSION,
        "process": {
            "terminal": true,
            "user": {"uid": 0, "gid": 0},
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm",
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "kiln",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "cgroup"},
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi",
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger",
            ],
        },
    })
}

/// What differs for a caller without privileges: the container's root is the caller, so that the
/// files it makes are the caller's. The guest is a machine of its own, so network and limits stay.
fn make_rootless(config: &mut Value) {
    let (uid, gid) = (nix::unistd::geteuid().as_raw(), nix::unistd::getegid().as_raw());
    let linux = &mut config["linux"];
    linux["uidMappings"] = json!([{"containerID": 0, "hostID": uid, "size": 1}]);
    linux["gidMappings"] = json!([{"containerID": 0, "hostID": gid, "size": 1}]);
    if let Some(namespaces) = linux["namespaces"].as_array_mut() {
        namespaces.push(json!({"type": "user"}));
    }
    let Some(mounts) = config["mounts"].as_array_mut() else { return };
    for options in mounts.iter_mut().filter_map(|mount| mount["options"].as_array_mut()) {
        // Group 5 isn't mapped.
        options.retain(|option| option != "gid=5");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_valid_oci_configurations() {
        let mut rootless = default_config();
        make_rootless(&mut rootless);
        for config in [default_config(), rootless] {
            let parsed: oci_spec::runtime::Spec =
                serde_json::from_value(config).expect("valid configuration");
            assert_eq!(
                parsed.mounts().as_ref().expect("mounts")[0].destination().to_str(),
                Some("/proc")
            );
        }
    }
}
