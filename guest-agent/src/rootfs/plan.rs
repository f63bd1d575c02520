//! What a container's tree is to look like, read from its configuration.

use std::path::{Path, PathBuf};

use kiln_protocol::{BindMount, CreateContainer, WindowSize};
use oci_spec::runtime::{Mount, Spec};

use super::devices::{self, Device};
use super::options::{self, MountOptions};
use crate::cgroup::devices::allow_all;
use crate::failure::Failure;

/// One entry of `mounts`.
#[derive(Debug, Clone)]
pub struct MountPlan {
    /// Its index.
    pub index: usize,
    /// Where, inside the container.
    pub destination: PathBuf,
    /// What is mounted.
    pub source: MountSource,
    /// How.
    pub options: MountOptions,
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MountSource {
    /// What the host put in the share.
    Share {
        /// Where in the share.
        path: PathBuf,
        /// Not a directory.
        is_file: bool,
    },
    /// A new file system.
    FileSystem {
        /// Its type's name in the kernel.
        kind: String,
        /// What it is told it is mounted from.
        source: String,
    },
}

impl MountPlan {
    /// The mount's name in messages.
    pub fn field(&self) -> String {
        format!("mounts[{}] ({})", self.index, self.destination.display())
    }

    pub(super) fn must_be_plain(&self) -> bool {
        matches!(&self.source, MountSource::FileSystem { kind, .. }
            if kind == "proc" || kind == "sysfs")
    }
}

/// The whole tree.
#[derive(Debug, Clone)]
pub struct RootfsPlan {
    /// Where the root file system is in the share.
    pub source: PathBuf,
    /// Mounts, in order.
    pub mounts: Vec<MountPlan>,
    /// Device nodes.
    pub devices: Vec<Device>,
    /// `/dev` is the container's own, to be filled with nodes and links.
    pub fill_dev: bool,
    /// `linux.maskedPaths`.
    pub masked_paths: Vec<PathBuf>,
    /// `linux.readonlyPaths`.
    pub read_only_paths: Vec<PathBuf>,
    /// `root.readonly`.
    pub read_only: bool,
    /// `linux.rootfsPropagation`.
    pub propagation: Option<(u64, bool)>,
    /// Size of the terminal, if there is to be one.
    pub terminal: Option<WindowSize>,
    /// `process.cwd`, created if missing.
    pub cwd: PathBuf,
}

impl RootfsPlan {
    /// Reads the configuration; `create` says what the host has put in the share.
    ///
    /// # Errors
    /// A field that can't be honoured, by name.
    pub fn from_spec(
        spec: &Spec,
        create: &CreateContainer,
        cwd: &Path,
        terminal: Option<WindowSize>,
    ) -> Result<Self, Failure> {
        let binds = &create.binds;
        let mounts = spec.mounts().iter().flatten().enumerate();
        let mounts: Vec<MountPlan> = mounts
            .map(|(index, mount)| plan_mount(index, mount, binds))
            .collect::<Result<_, _>>()?;
        if let Some(bind) = binds.iter().find(|bind| bind.mount >= mounts.len()) {
            return Err(Failure::config(format!("binds: mounts[{}] does not exist", bind.mount)));
        }
        let linux = spec.linux().as_ref();
        let configured = linux.and_then(|linux| linux.devices().as_deref()).unwrap_or(&[]);
        let resources = linux.and_then(|linux| linux.resources().as_ref());
        let rules = resources.and_then(|resources| resources.devices().as_deref());
        let devices = devices::plan(configured, rules.is_some_and(allow_all))?;
        let foreign_dev = |mount: &MountPlan| {
            mount.options.bind && mount.destination.components().eq(Path::new("/dev").components())
        };
        let paths = |paths: Option<&Option<Vec<String>>>| {
            paths.into_iter().flatten().flatten().map(PathBuf::from).collect()
        };
        let propagation = linux.and_then(|linux| linux.rootfs_propagation().as_deref());
        let propagation = propagation.filter(|word| !word.is_empty()).map(|word| {
            options::propagation(word).ok_or_else(|| {
                Failure::config(format!("linux.rootfsPropagation: unknown value {word:?}"))
            })
        });
        Ok(Self {
            source: PathBuf::from(&create.rootfs),
            devices,
            fill_dev: !mounts.iter().any(foreign_dev),
            mounts,
            masked_paths: paths(linux.map(|linux| linux.masked_paths())),
            read_only_paths: paths(linux.map(|linux| linux.readonly_paths())),
            read_only: spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false),
            propagation: propagation.transpose()?,
            terminal,
            cwd: cwd.to_owned(),
        })
    }
}

fn plan_mount(index: usize, mount: &Mount, binds: &[BindMount]) -> Result<MountPlan, Failure> {
    let field = format!("mounts[{index}]");
    let mapped = [mount.uid_mappings(), mount.gid_mappings()]
        .iter()
        .any(|mappings| mappings.as_ref().is_some_and(|mappings| !mappings.is_empty()));
    if mapped {
        return Err(Failure::config(format!(
            "{field}.uidMappings, gidMappings: id-mapped mounts are not supported"
        )));
    }
    let options = mount.options().as_deref().unwrap_or(&[]);
    let mut options = MountOptions::parse(options)
        .map_err(|why| Failure::config(format!("{field}.options: {why}")))?;
    let kind = mount.typ().as_deref().unwrap_or("");
    options.bind |= kind == "bind";
    let shared = binds.iter().find(|bind| bind.mount == index);
    let source = match shared {
        Some(bind) => MountSource::Share { path: PathBuf::from(&bind.path), is_file: bind.is_file },
        None if options.bind => {
            return Err(Failure::config(format!(
                "{field}: a bind mount whose source the host did not share"
            )));
        }
        None if kind.is_empty() || kind == "none" => {
            return Err(Failure::config(format!("{field}.type: missing, and no bind mount")));
        }
        None => file_system(kind, mount.source().as_deref()),
    };
    let destination = Path::new("/").join(mount.destination());
    if options.copy_up
        && !matches!(&source, MountSource::FileSystem { kind, .. } if kind == "tmpfs")
    {
        return Err(Failure::config(format!("{field}.options: \"tmpcopyup\" without a tmpfs")));
    }
    Ok(MountPlan { index, destination, source, options })
}

fn file_system(kind: &str, source: Option<&Path>) -> MountSource {
    // The guest has the unified hierarchy only; a container's "cgroup" mount is its view of that.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let source = source.map_or(kind.into(), |source| source.to_string_lossy());
    MountSource::FileSystem { kind: kind.to_owned(), source: source.into_owned() }
}
