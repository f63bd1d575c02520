//! A bundle as kiln takes it: read, checked, and reduced to what the host has to do.
//!
//! Everything wrong with a bundle is found here, before anything is started, and reported with the
//! file or field, the cause and the mend. Nothing is ignored: a field that kiln doesn't know
//! ([`fields`], [`annotations`]) or can't honour ([`refusals`]) is refused by name, but for the little
//! that is [`tolerated`]. What remains is set up by the agent inside the guest; the host resolves the root
//! file system and bind mounts ([`binds`]), the namespaces in which its own processes live
//! ([`namespaces`]), the hooks that it runs ([`hooks`]), the container's part in a pod ([`pod`]), and the
//! size of the machine ([`sizing`]).
//! A further program in a container, and changes of its limits, are checked likewise ([`process`],
//! [`resources`]).

mod annotations;
mod binds;
mod fields;
mod hooks;
mod id;
mod mountpoints;
mod namespaces;
pub mod pod;
mod process;
mod refusals;
pub mod resources;
mod rlimits;
mod sizing;
mod tolerated;

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use oci_spec::runtime::Spec;
use serde_json::Value;
use serde_json::value::RawValue;

pub use binds::Bind;
pub use hooks::HostHooks;
pub use id::validate as validate_id;
pub use namespaces::{Namespace, NamespaceKind};
pub use process::{Changes, Program};
pub use sizing::{Host, Limits, Size, memory_limit};

/// Longest config.json in bytes: what fits into a frame to the agent, with room for the rest of it.
const MAX_CONFIG: u64 = (kiln_protocol::MAX_TO_AGENT - (64 << 10)) as u64;

/// A checked bundle.
#[derive(Debug)]
pub struct Bundle {
    /// The bundle's directory, absolute.
    pub dir: PathBuf,
    /// `config.json`, byte for byte unless something in it was [`tolerated`].
    pub config: Box<RawValue>,
    /// What it says.
    pub spec: Spec,
    /// The root file system's directory, absolute, symbolic links resolved.
    pub rootfs: PathBuf,
    /// The container may not write to its root file system.
    pub rootfs_read_only: bool,
    /// The bind mounts among `mounts`.
    pub binds: Vec<Bind>,
    /// The namespaces of the host that the sandbox's monitor lives in.
    pub namespaces: Vec<Namespace>,
    /// The hooks that run on the host.
    pub hooks: HostHooks,
    /// Its part in a pod, if it has one.
    pub pod: Option<pod::Part>,
}

/// Why a bundle is refused.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The directory or its config.json can't be read.
    #[error("{}: {}", .path.display(), absent_or(.source, .mend))]
    Unreadable {
        /// What can't be read.
        path: PathBuf,
        /// What to do if it's absent.
        mend: &'static str,
        /// Why.
        source: io::Error,
    },
    /// config.json is larger than any that fits into a message to the agent.
    #[error("{}: {length} bytes exceed the limit of {MAX_CONFIG}", .path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        length: u64,
    },
    /// config.json is no JSON, or a value has the wrong type.
    #[error("{}: {source}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong, with line and column.
        source: serde_json::Error,
    },
    /// A field can't be honoured.
    #[error("{field}: {reason}")]
    Field {
        /// Its path, as in `linux.resources.cpu.quota`.
        field: String,
        /// Cause and mend.
        reason: String,
    },
}

impl BundleError {
    fn field(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Field { field: field.into(), reason: reason.into() }
    }
}

fn absent_or(error: &io::Error, mend: &str) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!("not found: {mend}"),
        _ => error.to_string(),
    }
}

impl Bundle {
    /// Reads and checks the bundle in a directory.
    ///
    /// # Errors
    /// See [`BundleError`].
    pub fn load(dir: &Path) -> Result<Self, BundleError> {
        let dir = dir.canonicalize().map_err(|source| BundleError::Unreadable {
            path: dir.to_owned(),
            mend: "name the bundle's directory with --bundle",
            source,
        })?;
        let path = dir.join("config.json");
        let text = read_config(&path)?;
        let malformed = |source| BundleError::Malformed { path: path.clone(), source };
        let mut raw: Value = serde_json::from_str(&text).map_err(malformed)?;
        rlimits::check(&raw["process"])?;
        let notes = raw.get_mut("process").map(tolerated::leave_out).unwrap_or_default();
        for note in &notes {
            tracing::warn!("{note}");
        }
        // Errors have the line and column of the text as it is, wherever it is used as it is.
        let text = if notes.is_empty() { text } else { raw.to_string() };
        let config: Box<RawValue> = serde_json::from_str(&text).map_err(malformed)?;
        let spec: Spec = serde_json::from_str(&text).map_err(malformed)?;
        fields::check(&raw)?;
        annotations::check(&spec)?;
        refusals::check(&spec, &raw)?;
        let (rootfs, rootfs_read_only) = find_rootfs(&dir, &spec)?;
        let binds = binds::find(&dir, &spec)?;
        let pod = pod::find(&spec)?;
        let namespaces = namespaces::find(&spec, pod.as_ref())?;
        let hooks = hooks::find(&spec)?;
        Ok(Self { dir, config, spec, rootfs, rootfs_read_only, binds, namespaces, hooks, pod })
    }

    /// The value of an annotation.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.spec.annotations().as_ref()?.get(name).map(String::as_str)
    }

    /// What an annotation that is for kiln says, if it is there.
    ///
    /// # Errors
    /// It says nothing that can be.
    pub fn setting<T>(&self, name: &str) -> Result<Option<T>, BundleError>
    where
        T: FromStr<Err: fmt::Display>,
    {
        let Some(text) = self.annotation(name) else { return Ok(None) };
        text.parse().map(Some).map_err(|error| {
            BundleError::field(format!("annotations[{name:?}]"), format!("{text:?}: {error}"))
        })
    }

    /// Makes missing mount points where the guest can't.
    ///
    /// # Errors
    /// The root file system can't be opened.
    pub fn make_mountpoints(&self) -> io::Result<()> {
        if self.rootfs_read_only {
            mountpoints::make(&self.rootfs, &self.spec, &self.binds)?;
        }
        Ok(())
    }

    /// The process gets a terminal.
    pub fn terminal(&self) -> bool {
        let process = self.spec.process().as_ref();
        process.and_then(|process| process.terminal()).unwrap_or(false)
    }
}

/// Reads the `config.json` at a path, unchecked.
///
/// # Errors
/// It can't be read, or is too long.
pub fn read_config(path: &Path) -> Result<String, BundleError> {
    read(path, "`kiln spec` writes one")
}

fn read(path: &Path, mend: &'static str) -> Result<String, BundleError> {
    let unreadable = |source| BundleError::Unreadable { path: path.to_owned(), mend, source };
    // A FIFO would be waited for, and a device may have no end.
    let flags = libc::O_NONBLOCK | libc::O_NOCTTY;
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(unreadable(io::Error::other("not a regular file")));
    }
    let mut text = String::new();
    let read = file.take(MAX_CONFIG + 1).read_to_string(&mut text);
    let length = metadata.len().max(text.len() as u64);
    if length > MAX_CONFIG {
        return Err(BundleError::TooLong { path: path.to_owned(), length });
    }
    read.map_err(unreadable)?;
    Ok(text)
}

fn find_rootfs(dir: &Path, spec: &Spec) -> Result<(PathBuf, bool), BundleError> {
    let Some(root) = spec.root() else {
        return Err(BundleError::field("root", "missing: name the root file system's directory"));
    };
    // Without a slash at its end, after which a link would be followed.
    let named: PathBuf = dir.join(root.path()).components().collect();
    if is_linked(dir, &named) {
        let reason = format!(
            "root file system {} is a symbolic link: name the directory that it leads to",
            named.display()
        );
        return Err(BundleError::field("root.path", reason));
    }
    let path = named.canonicalize().map_err(|error| {
        BundleError::field("root.path", format!("root file system {}: {error}", named.display()))
    })?;
    if !path.is_dir() {
        let reason = format!("root file system {} is not a directory", named.display());
        return Err(BundleError::field("root.path", reason));
    }
    Ok((path, root.readonly().unwrap_or(false)))
}

/// Whether a path is a symbolic link or, as far as it lies below `dir`, leads through one: as runc has
/// it, what a bundle's link leads to is not what was named.
fn is_linked(dir: &Path, path: &Path) -> bool {
    let mut below = path.ancestors().take_while(|above| *above != dir && above.starts_with(dir));
    path.is_symlink() || below.any(Path::is_symlink)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bundle(config: &str) -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("temporary directory");
        std::fs::write(dir.path().join("config.json"), config).expect("written");
        std::fs::create_dir(dir.path().join("rootfs")).expect("made");
        dir
    }

    fn minimal() -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["true"], "cwd": "/"},
            "root": {"path": "rootfs"},
        })
    }

    fn refusal(config: Value) -> String {
        let dir = bundle(&config.to_string());
        Bundle::load(dir.path()).expect_err("refused").to_string()
    }

    #[test]
    fn malformed_json_is_reported_with_line_and_column() {
        let dir = bundle("{\n  \"ociVersion\": 1.0.2\n}");
        let error = Bundle::load(dir.path()).expect_err("malformed").to_string();
        assert!(error.contains("line 2 column 20"), "{error}");
    }

    #[test]
    fn wrong_types_are_reported_with_line_and_column() {
        let dir = bundle("{\"ociVersion\": \"1.0.2\",\n \"hostname\": 3}");
        let error = Bundle::load(dir.path()).expect_err("malformed").to_string();
        assert!(error.contains("line 2 column"), "{error}");
    }

    #[test]
    fn configuration_is_kept_byte_for_byte() {
        let text = minimal().to_string().replace(':', " :  ");
        let dir = bundle(&text);
        assert_eq!(Bundle::load(dir.path()).expect("valid").config.get(), text);
    }

    #[test]
    fn missing_config_says_how_to_get_one() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = Bundle::load(dir.path()).expect_err("missing").to_string();
        assert!(error.contains("config.json") && error.contains("kiln spec"), "{error}");
    }

    #[test]
    fn missing_rootfs_is_named() {
        let mut config = minimal();
        config["root"]["path"] = "elsewhere".into();
        let error = refusal(config);
        assert!(error.starts_with("root.path: ") && error.contains("elsewhere"), "{error}");
    }

    #[test]
    fn unknown_and_unsupported_fields_are_named() {
        let refused = [
            ("/process/sandboxed", json!(true)),
            ("/root/rootKind", json!("x")),
            ("/mounts", json!([{"destination": "/x", "fancy": 1}])),
            ("/process/user", json!([0, 0, null, null, null])),
            ("/linux", json!({"resources": {"cpu": {"burstiness": 1}}})),
            ("/linux", json!({"intelRdt": {}})),
            ("/linux", json!({"namespaces": [{"type": "network", "path": "/run/netns/x"}]})),
            ("/linux", json!({"mountLabel": "system_u:object_r:x"})),
            ("/process/apparmorProfile", json!("my-profile")),
            ("/process/selinuxLabel", json!("x")),
            ("/hooks", json!({"startContainer": [{"path": "/bin/true", "timeout": 0}]})),
            ("/hooks", json!({"poststop": [{"path": "bin/true"}]})),
            ("/hooks", json!({"poststop": [{"path": "/bin/true", "shell": true}]})),
            ("/windows", json!({})),
        ];
        let expected = [
            "process.sandboxed: ",
            "root.rootKind: ",
            "mounts[0].fancy: ",
            "process.user: a list",
            "linux.resources.cpu.burstiness: ",
            "linux.intelRdt: ",
            "linux.namespaces[0].path: ",
            "linux.mountLabel: ",
            "process.apparmorProfile: ",
            "process.selinuxLabel: ",
            "hooks.startContainer[0].timeout: ",
            "hooks.poststop[0].path: ",
            "hooks.poststop[0].shell: ",
            "windows: ",
        ];
        for ((pointer, value), expected) in refused.into_iter().zip(expected) {
            let mut config = minimal();
            let (parent, name) = pointer.rsplit_once('/').expect("a pointer");
            config.pointer_mut(parent).expect("parent")[name] = value;
            let error = refusal(config);
            assert!(error.starts_with(expected), "{pointer}: {error}");
        }
    }
}
