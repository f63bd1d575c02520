//! What the processes of a sandbox ask of the host besides an engine.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::Check;
use crate::privileges;
use crate::sandbox::machine::find_program;

const PRIVILEGES: &str = "privileges";
const NAMESPACES: &str = "namespaces";
const CGROUPS: &str = "cgroups";
const TUN: &str = "tun";
const EROFS: &str = "mkfs.erofs";

const NEEDED_NAMESPACES: [&str; 6] = ["mnt", "net", "ipc", "uts", "cgroup", "user"];

/// Does the checks.
pub fn checks() -> Vec<Check> {
    vec![privileges(), namespaces(Path::new("/proc/self/ns")), cgroups(), tun(), erofs()]
}

fn privileges() -> Check {
    const MEND: &str = "run kiln as root, or give it these capabilities";
    let (who, lacking) = match privileges::lacking() {
        Ok(lacking) => (privileges::who(), lacking),
        Err(error) => {
            let explanation = format!("{:#}", anyhow::Error::new(error));
            return Check::fail(PRIVILEGES, explanation, "run kiln as root");
        }
    };
    let without = |names: Vec<&str>| format!("{who}, without {}", names.join(", "));
    if !lacking.vital.is_empty() {
        let explanation = format!("{}: containers can't be run", without(lacking.vital));
        return Check::fail(PRIVILEGES, explanation, MEND);
    }
    if !lacking.useful.is_empty() {
        let what = "device nodes or networks are out of reach";
        let explanation = format!("{}: {what}", without(lacking.useful));
        return Check::warn(PRIVILEGES, explanation, MEND);
    }
    Check::ok(PRIVILEGES, format!("{who}, with every capability that is needed"))
}

fn namespaces(dir: &Path) -> Check {
    let missing: Vec<_> =
        NEEDED_NAMESPACES.into_iter().filter(|name| !dir.join(name).exists()).collect();
    match missing.is_empty() {
        true => Check::ok(NAMESPACES, format!("the kernel has {}", NEEDED_NAMESPACES.join(", "))),
        false => Check::fail(
            NAMESPACES,
            format!("the kernel lacks {}: sandboxes can't be jailed", missing.join(", ")),
            "use a kernel with CONFIG_NAMESPACES and all of its options",
        ),
    }
}

fn cgroups() -> Check {
    const ROOT: &str = "/sys/fs/cgroup";
    match statfs(ROOT) {
        Ok(found) if found.filesystem_type() == CGROUP2_SUPER_MAGIC => {
            let controllers = std::fs::read_to_string(format!("{ROOT}/cgroup.controllers"));
            let controllers = controllers.unwrap_or_default();
            Check::ok(CGROUPS, format!("version 2, with {}", controllers.trim()))
        }
        Ok(_) => Check::ok(CGROUPS, "version 1"),
        Err(error) => Check::warn(
            CGROUPS,
            format!("{ROOT}: {error}; limits apply inside the guest only"),
            "mount cgroup2 there",
        ),
    }
}

fn tun() -> Check {
    const PATH: &str = "/dev/net/tun";
    match OpenOptions::new().read(true).write(true).open(PATH) {
        Ok(_) => Check::ok(TUN, format!("{PATH} opens")),
        Err(error) => {
            let mend = match error.kind() {
                io::ErrorKind::NotFound => {
                    "load its module (modprobe tun); in a container, pass it"
                }
                io::ErrorKind::PermissionDenied => "run kiln as root, or allow its user the device",
                _ => "load its module (modprobe tun)",
            };
            let explanation = format!("{PATH}: {error}; guests have no network");
            Check::warn(TUN, explanation, mend)
        }
    }
}

fn erofs() -> Check {
    match find_program(Path::new("mkfs.erofs")) {
        Ok(path) => Check::ok(EROFS, format!("{} makes images of layers", path.display())),
        Err(_) => Check::warn(
            EROFS,
            "not there: layers of images can't be turned into shared read-only disks",
            "install erofs-utils",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn missing_namespaces_are_named() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for name in NEEDED_NAMESPACES {
            std::fs::write(dir.path().join(name), "").expect("written");
        }
        assert_eq!(namespaces(dir.path()).status, Status::Ok);
        std::fs::remove_file(dir.path().join("uts")).expect("removed");
        let check = namespaces(dir.path());
        assert_eq!(check.status, Status::Fail);
        assert!(check.explanation.contains("lacks uts:"), "{}", check.explanation);
    }

    #[test]
    fn every_check_that_is_not_ok_has_a_mend() {
        for check in checks() {
            assert_eq!(check.mend.is_some(), check.status != Status::Ok, "{check:?}");
        }
    }
}
