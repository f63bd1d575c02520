//! The bind mounts of a bundle, and overlays of the host's directories: what the host puts into the
//! guest's share.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use serde::{Deserialize, Serialize};

use super::BundleError;

/// One entry of `mounts` that is a bind mount, or an overlay.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bind {
    /// Index into `mounts`.
    pub index: usize,
    /// The source, absolute; of an overlay what the bundle says, which means nothing.
    pub source: PathBuf,
    /// The parameters of an overlay that is to be mounted; none for a bind mount.
    pub overlay: Vec<(String, Option<String>)>,
    /// Where the container finds it.
    pub destination: PathBuf,
    /// It is not a directory.
    pub is_file: bool,
    /// The container may not write.
    pub read_only: bool,
    /// With what is mounted below it.
    pub recursive: bool,
}

/// Finds the bind mounts and overlays; relative sources are relative to the bundle.
///
/// # Errors
/// A source that is missing, or isn't there.
pub fn find(bundle: &Path, spec: &Spec) -> Result<Vec<Bind>, BundleError> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    mounts
        .iter()
        .enumerate()
        .filter_map(|(index, mount)| match () {
            () if is_bind(mount) => Some(resolve(bundle, index, mount)),
            () if mount.typ().as_deref() == Some("overlay") => Some(Ok(overlay(index, mount))),
            () => None,
        })
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
    Ok(Bind {
        index,
        source,
        overlay: Vec::new(),
        destination: mount.destination().clone(),
        is_file: !metadata.is_dir(),
        read_only: is_read_only(mount),
        recursive: options(mount).iter().any(|option| option == "rbind"),
    })
}

/// Flags of overlayfs(5) without a value. All other options without one are the mount's.
const OVERLAY_FLAGS: [&str; 2] = ["volatile", "userxattr"];

fn overlay(index: usize, mount: &Mount) -> Bind {
    let parameters = options(mount).iter().filter_map(|option| match option.split_once('=') {
        Some((key, value)) => Some((key.to_owned(), Some(value.to_owned()))),
        None => OVERLAY_FLAGS.contains(&option.as_str()).then(|| (option.clone(), None)),
    });
    Bind {
        index,
        source: mount.source().clone().unwrap_or_default(),
        overlay: parameters.collect(),
        destination: mount.destination().clone(),
        is_file: false,
        read_only: is_read_only(mount),
        recursive: false,
    }
}

fn is_read_only(mount: &Mount) -> bool {
    let mut options = options(mount).iter().rev();
    let last = options.find(|option| ["ro", "rro", "rw", "rrw"].contains(&option.as_str()));
    last.is_some_and(|option| option.ends_with("ro"))
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
            overlay: Vec::new(),
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
    fn overlays_have_the_parameters_of_their_file_system() {
        let binds = find_in(json!([
            {"destination": "/v", "type": "overlay", "source": "overlay",
             "options": ["lowerdir=/a\\:b:/c", "upperdir=/d", "volatile", "private", "nodev", "ro"]},
        ]));
        let [overlay] = &binds.expect("valid")[..] else { panic!("one mount") };
        let parameters = [
            ("lowerdir".to_owned(), Some("/a\\:b:/c".to_owned())),
            ("upperdir".to_owned(), Some("/d".to_owned())),
            ("volatile".to_owned(), None),
        ];
        assert_eq!(overlay.overlay, parameters);
        assert!(overlay.read_only && !overlay.is_file);
    }

    #[test]
    fn absent_source_is_named() {
        let mounts = json!([{"destination": "/a", "type": "bind", "source": "/nonexistent/kiln"}]);
        let error = find_in(mounts).expect_err("absent").to_string();
        assert!(error.starts_with("mounts[0].source: /nonexistent/kiln: "), "{error}");
    }
}
