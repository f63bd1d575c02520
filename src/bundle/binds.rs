//! The bind mounts of a bundle: what the host puts into the guest's share.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use serde::{Deserialize, Serialize};

use super::BundleError;

/// One entry of `mounts` that is a bind mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// Index into `mounts`.
    pub index: usize,
    /// The source, absolute.
    pub source: PathBuf,
    /// Where the container finds it.
    pub destination: PathBuf,
    /// It is not a directory.
    pub is_file: bool,
    /// The container may not write.
    pub read_only: bool,
    /// With what is mounted below it.
    pub recursive: bool,
}

/// Finds the bind mounts; relative sources are relative to the bundle.
///
/// # Errors
/// A source that is missing, or isn't there.
pub fn find(bundle: &Path, spec: &Spec) -> Result<Vec<Bind>, BundleError> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| is_bind(mount))
        .map(|(index, mount)| resolve(bundle, index, mount))
        .collect()
}

fn options(mount: &Mount) -> &[String] {
    mount.options().as_deref().unwrap_or_default()
}

fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind")
        || options(mount).iter().any(|option| option == "bind" || option == "rbind")
}

fn resolve(bundle: &Path, index: usize, mount: &Mount) -> Result<Bind, BundleError> {
    let field = || format!("mounts[{index}].source");
    let Some(source) = mount.source() else {
        return Err(BundleError::field(field(), "missing: a bind mount needs a source"));
    };
    let source = bundle.join(source);
    let metadata = source
        .metadata()
        .map_err(|error| BundleError::field(field(), format!("{}: {error}", source.display())))?;
    let last = |set: &[&str]| {
        options(mount).iter().rev().find(|option| set.contains(&option.as_str())).cloned()
    };
    let read_only = last(&["ro", "rro", "rw", "rrw"]).is_some_and(|option| option.ends_with("ro"));
    let recursive = options(mount).iter().any(|option| option == "rbind");
    let destination = mount.destination().clone();
    Ok(Bind { index, source, destination, is_file: !metadata.is_dir(), read_only, recursive })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn find_in(mounts: serde_json::Value) -> Result<Vec<Bind>, BundleError> {
        let spec: Spec =
            serde_json::from_value(json!({"ociVersion": "1.0.2", "mounts": mounts})).expect("spec");
        find(Path::new("/"), &spec)
    }

    #[test]
    fn binds_are_found_by_type_or_option_with_their_index() {
        let binds = find_in(json!([
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/a", "type": "bind", "source": "/tmp", "options": ["rw", "ro"]},
            {"destination": "/b", "source": "etc/passwd", "options": ["rbind", "rprivate", "ro", "rw"]},
        ]))
        .expect("valid");
        let bind = |index, source: &str, is_file, read_only, recursive| Bind {
            index,
            source: source.into(),
            destination: if is_file { "/b" } else { "/a" }.into(),
            is_file,
            read_only,
            recursive,
        };
        assert_eq!(
            binds,
            [bind(1, "/tmp", false, true, false), bind(2, "/etc/passwd", true, false, true)]
        );
    }

    #[test]
    fn absent_source_is_named() {
        let mounts = json!([{"destination": "/a", "type": "bind", "source": "/nonexistent/kiln"}]);
        let error = find_in(mounts).expect_err("absent").to_string();
        assert!(error.starts_with("mounts[0].source: /nonexistent/kiln: "), "{error}");
    }
}
