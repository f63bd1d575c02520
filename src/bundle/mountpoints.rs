//! Places for a container's mounts in a root file system that its guest may not write.
//!
//! A missing mount point is made in the root file system, as every OCI runtime does. Usually the agent
//! makes it, in the guest; where the guest gets the root file system read-only the host must do so
//! first. Links in the root file system are not trusted ([`kiln_rooted`]). What can't be made is left
//! to the agent, which names the mount whose place is missing.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use kiln_rooted::{Kind, ensure, lookup};
use oci_spec::runtime::Spec;

use super::Bind;

/// Makes the places that the mounts of `spec` and its working directory need in `rootfs`.
///
/// # Errors
/// The root file system can't be opened.
pub fn make(rootfs: &Path, spec: &Spec, binds: &[Bind]) -> io::Result<()> {
    let root = File::options().read(true).custom_flags(libc::O_PATH).open(rootfs)?;
    for (path, kind) in wanted(spec, binds) {
        // A file system that is read-only here too holds what it holds.
        if let Err(error) = make_one(root.as_fd(), &path, kind, is_tmpfs(spec, &path)) {
            tracing::debug!(path = %path.display(), %error, "no mount point made");
        }
    }
    Ok(())
}

/// A tmpfs takes the mode of the directory that it is mounted on, and is everybody's where there was
/// none: so is the place that is made for it.
fn make_one(root: BorrowedFd<'_>, path: &Path, kind: Kind, is_tmpfs: bool) -> io::Result<()> {
    let is_missing = lookup(root, path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound);
    let made = ensure(root, path, kind)?;
    if is_missing && is_tmpfs {
        let path = format!("/proc/self/fd/{}", made.as_raw_fd());
        fs::set_permissions(path, fs::Permissions::from_mode(0o1777))?;
    }
    Ok(())
}

fn is_tmpfs(spec: &Spec, path: &Path) -> bool {
    let mut mounts = spec.mounts().iter().flatten();
    mounts.any(|mount| mount.destination() == path && mount.typ().as_deref() == Some("tmpfs"))
}

/// What lies below another mount's place is made in that mount, by the agent.
fn wanted(spec: &Spec, binds: &[Bind]) -> Vec<(PathBuf, Kind)> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let is_file = |index| binds.iter().any(|bind| bind.index == index && bind.is_file);
    let destinations = mounts.iter().enumerate().map(|(index, mount)| {
        let kind = if is_file(index) { Kind::File } else { Kind::Directory };
        (mount.destination().clone(), kind)
    });
    let cwd = spec.process().iter().map(|process| (process.cwd().clone(), Kind::Directory));
    let places: Vec<_> = destinations.chain(cwd).collect();
    let covered = |path: &Path| {
        let mut above = path.ancestors().skip(1);
        above.any(|above| mounts.iter().any(|mount| mount.destination() == above))
    };
    places.into_iter().filter(|(path, _)| !covered(path)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn places_are_made_inside_the_root_and_not_below_other_mounts() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let rootfs = dir.path().join("rootfs");
        std::fs::create_dir(&rootfs).expect("rootfs");
        std::os::unix::fs::symlink("../../out", rootfs.join("link")).expect("symlink");
        let spec: Spec = serde_json::from_value(json!({
            "ociVersion": "1.0.2",
            "process": {"cwd": "/work/deep", "args": ["true"], "user": {"uid": 0, "gid": 0}},
            "mounts": [
                {"destination": "/work", "type": "bind", "source": "/tmp"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts"},
                {"destination": "/link/x", "type": "tmpfs", "source": "tmpfs"},
                {"destination": "/etc/hosts", "type": "bind", "source": "/etc/hosts"},
            ],
        }))
        .expect("spec");
        let file = Bind {
            index: 4,
            source: "/etc/hosts".into(),
            overlay: Vec::new(),
            destination: "/etc/hosts".into(),
            is_file: true,
            read_only: false,
            recursive: false,
        };
        make(&rootfs, &spec, &[file]).expect("makes");
        for directory in ["work", "dev", "out/x"] {
            assert!(rootfs.join(directory).is_dir(), "{directory}");
        }
        let mode = |path: &str| fs::metadata(rootfs.join(path)).expect(path).mode() & 0o7777;
        assert_eq!((mode("work"), mode("dev")), (0o755, 0o1777));
        assert!(rootfs.join("etc/hosts").is_file());
        assert!(!rootfs.join("dev/pts").exists() && !rootfs.join("work/deep").exists());
        assert!(!dir.path().join("out").exists());
    }
}
