//! `/dev/kvm`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid};

/// Where the device is.
pub const PATH: &str = "/dev/kvm";

/// Why the device can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// There is none.
    #[error(
        "{} does not exist: {}", .path.display(),
        if *.in_processor {
            "load the kernel module (modprobe kvm_intel or kvm_amd); in a container, pass the \
             device in"
        } else {
            "the processor offers no virtualisation: switch it on in the firmware, or, in a \
             virtual machine, nested virtualisation on its host"
        }
    )]
    Missing {
        /// Where it should be.
        path: PathBuf,
        /// The processor says that it can virtualise.
        in_processor: bool,
    },
    /// Not for this user.
    #[error("no permission to open {} for reading and writing: {mend}", .path.display())]
    Permission {
        /// The device.
        path: PathBuf,
        /// What gives the permission.
        mend: String,
    },
    /// Anything else.
    #[error("{} can't be opened: {source}", .path.display())]
    Other {
        /// The device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Opens the device.
///
/// # Errors
/// See [`DeviceError`].
pub fn open() -> Result<File, DeviceError> {
    open_at(Path::new(PATH))
}

fn open_at(path: &Path) -> Result<File, DeviceError> {
    let path = path.to_owned();
    OpenOptions::new().read(true).write(true).open(&path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => {
            let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
            DeviceError::Missing { in_processor: virtualises(&cpuinfo), path }
        }
        io::ErrorKind::PermissionDenied => {
            let mend = permission_mend(&path);
            DeviceError::Permission { path, mend }
        }
        _ => DeviceError::Other { path, source },
    })
}

fn virtualises(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    flags.split_ascii_whitespace().any(|flag| flag == "vmx" || flag == "svm")
}

fn permission_mend(path: &Path) -> String {
    let group = std::fs::metadata(path)
        .ok()
        .filter(|metadata| metadata.mode() & 0o060 == 0o060)
        .and_then(|metadata| Group::from_gid(Gid::from_raw(metadata.gid())).ok().flatten());
    match group {
        Some(group) => format!(
            "add the user to the group {0} (usermod -aG {0} USER) and log in again",
            group.name
        ),
        None => format!("give user {} access (setfacl -m u:USER:rw {PATH})", Uid::effective()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_is_explained_by_the_processor() {
        assert!(virtualises("processor : 0\nflags\t\t: fpu vmx sse\n"));
        assert!(!virtualises("processor : 0\nflags\t\t: fpu vmxx sse\n"));
        let error = open_at(Path::new("/nonexistent/kvm")).expect_err("missing");
        assert!(matches!(error, DeviceError::Missing { .. }), "{error}");
    }

    #[test]
    fn the_mend_names_the_group_that_may() {
        use std::os::unix::fs::PermissionsExt;

        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let set_mode = |mode| {
            let permissions = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(file.path(), permissions).expect("mode");
        };
        let gid = Gid::from_raw(file.path().metadata().expect("metadata").gid());
        let group = Group::from_gid(gid).expect("groups").expect("a name").name;
        set_mode(0o660);
        assert!(permission_mend(file.path()).contains(&format!("usermod -aG {group}")));
        set_mode(0o600);
        assert!(permission_mend(file.path()).contains("setfacl"));
    }
}
