//! The jail of a program that isn't ours: QEMU.
//!
//! It can't jail itself once it has opened what it needs, so it is jailed between fork and exec:
//! unprivileged user, no capability, no new privileges, namespaces of its own (network included), and
//! a root in which there are only the paths it is to see, read-only, and a `/proc` that shows
//! nothing but itself. Landlock refuses to change a file and to reach anybody outside, and a
//! [list](super::seccomp::denied) of system calls is closed to it; what else it forbids itself is its
//! own business (`-sandbox`).
//!
//! [`Foreign::plan`] does the thinking and allocating, in the parent; [`Foreign::enter`] makes
//! system calls only, as must be between fork and exec.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use capctl::caps::CapSet;
use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, OFlags, mkdirat, openat, symlinkat};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
use rustix::mount::{OpenTreeFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen};
use seccompiler::BpfProgram;

use super::error::During;
use super::limits::Limits;
use super::{CHEAP_NAMESPACES, JailError, capabilities, hardening, identity, landlock};
use super::{namespaces, root, seccomp};
use crate::config::JailConfig;

/// Where distributions keep programs, their libraries and their data. Those that exist are shown.
pub const PROGRAM_PATHS: &[&str] =
    &["/usr", "/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/nix/store", "/gnu/store"];

/// The jail of a foreign program, planned.
#[derive(Debug)]
pub struct Foreign {
    identity: JailConfig,
    limits: Limits,
    shown: Vec<Shown>,
    denied: BpfProgram,
}

/// A path of the host that the program sees under the same name.
#[derive(Debug)]
struct Shown {
    /// Every directory above it, topmost first, relative to the root.
    above: Vec<CString>,
    /// Relative to the root.
    path: CString,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Directory { on_host: CString },
    File { on_host: CString },
    Symlink { target: CString },
}

impl Foreign {
    /// Plans a jail in which the program sees `paths`, of which those that don't exist are left
    /// out. A symbolic link is shown as such.
    ///
    /// # Errors
    /// A path is relative, contains `..`, or can't be looked at; the system calls' list is wrong.
    pub fn plan(
        identity: JailConfig,
        limits: Limits,
        paths: impl IntoIterator<Item = impl Into<PathBuf>>,
    ) -> Result<Self, JailError> {
        identity::check(identity)?;
        let mut shown = Vec::new();
        let mut seen: Vec<PathBuf> = Vec::new();
        for path in paths.into_iter().map(Into::into) {
            // What lies below a path that is shown already is in it, or behind the same link.
            if seen.iter().any(|above| path.starts_with(above)) {
                continue;
            }
            if let Some(look) = Shown::look_at(&path)? {
                shown.push(look);
                seen.push(path);
            }
        }
        Ok(Self { identity, limits, shown, denied: seccomp::denied::compile()? })
    }

    /// Plans a jail for `program`, an absolute path: it sees [`PROGRAM_PATHS`], and if it isn't
    /// there itself, what was installed with it (`/opt/x` for `/opt/x/bin/program`), else itself.
    ///
    /// # Errors
    /// As [`Foreign::plan`]; and the program can't be found.
    pub fn for_program(
        identity: JailConfig,
        limits: Limits,
        program: &Path,
    ) -> Result<Self, JailError> {
        let real = fs::canonicalize(program).during("find the program to be jailed")?;
        let bin = program.parent().filter(|parent| parent.ends_with("bin"));
        let prefix = bin.and_then(Path::parent).filter(|prefix| prefix.parent().is_some());
        let standard = PROGRAM_PATHS.iter().copied().map(Path::new);
        let paths = standard.chain(prefix).chain([program, &real]);
        Self::plan(identity, limits, paths)
    }

    /// Jails the calling process, which has one thread and is about to exec. What it had open it
    /// keeps.
    ///
    /// # Errors
    /// A step failed; the process must not exec. The step is also written to standard error,
    /// because only the error number survives what `std::process::Command` makes of an error.
    pub fn enter(&self) -> io::Result<()> {
        self.steps().map_err(|error| {
            let (step, source) = match error {
                JailError::Step { step, source } => (step, source),
                _ => ("enter the jail", io::Error::from_raw_os_error(libc::EPERM)),
            };
            for text in ["kiln: the program that was to be jailed can't ", step, "\n"] {
                // SAFETY: the pointer and length are those of `text`; failure changes nothing.
                unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
            }
            source
        })
    }

    fn steps(&self) -> Result<(), JailError> {
        let privileged = identity::may_change();
        self.limits.set()?;
        if !privileged {
            namespaces::leave_user(self.identity.uid, self.identity.gid)?;
            // Who has power over users has not had it over processes: the starter could make no pid
            // namespace, and only who is in one of its own may mount a `/proc`.
            namespaces::go_on_alone()?;
        }
        namespaces::leave(CHEAP_NAMESPACES.union(CloneFlags::CLONE_NEWNET))?;
        root::detach_from_host()?;
        self.enter_root()?;
        capabilities::lock(CapSet::empty())?;
        if privileged {
            identity::take_on(self.identity)?;
        }
        capabilities::reduce_to(CapSet::empty())?;
        hardening::no_new_privileges()?;
        landlock::deny_changes()?;
        seccompiler::apply_filter(&self.denied).map_err(JailError::Load)
    }

    fn enter_root(&self) -> Result<(), JailError> {
        let new = root::new_tmpfs(&[(c"size", c"64k"), (c"mode", c"0755")])?;
        // Mounted now, for nothing can be mounted below what isn't; the host's paths stay within
        // reach because lookups of absolute paths begin at the old root until the pivot.
        root::attach(new.as_fd(), c"/").during("mount the program's root")?;
        for shown in &self.shown {
            shown.show_in(&new).during("show the program a path of the host")?;
        }
        show_proc(&new)?;
        root::set_attributes(new.as_fd(), root::READ_ONLY, false)
            .during("make the program's root read-only")?;
        root::pivot_into(new.as_fd())
    }
}

impl Shown {
    fn look_at(path: &Path) -> Result<Option<Self>, JailError> {
        let mut components = path.components();
        let plain = components.next() == Some(Component::RootDir)
            && components.all(|component| matches!(component, Component::Normal(_)));
        let Ok(relative) = path.strip_prefix("/") else {
            return Err(JailError::Path(path.to_owned()));
        };
        if !plain || relative.as_os_str().is_empty() {
            return Err(JailError::Path(path.to_owned()));
        }
        let metadata = match fs::symlink_metadata(path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).during("look at a path to show a jailed program"),
        };
        let c_string = |path: &Path| {
            CString::new(path.as_os_str().as_bytes()).map_err(|_| JailError::Path(path.to_owned()))
        };
        let kind = if metadata.is_symlink() {
            let target = fs::read_link(path).during("read a symbolic link")?;
            Kind::Symlink { target: c_string(&target)? }
        } else if metadata.is_dir() {
            Kind::Directory { on_host: c_string(path)? }
        } else {
            Kind::File { on_host: c_string(path)? }
        };
        let above: Vec<&Path> =
            relative.ancestors().skip(1).filter(|path| !path.as_os_str().is_empty()).collect();
        let above = above.into_iter().rev().map(c_string).collect::<Result<_, _>>()?;
        Ok(Some(Self { above, path: c_string(relative)?, kind }))
    }

    fn show_in(&self, root: &OwnedFd) -> io::Result<()> {
        for directory in &self.above {
            make_directory(root, directory)?;
        }
        match &self.kind {
            Kind::Symlink { target } => Ok(symlinkat(&**target, root, &*self.path)?),
            Kind::Directory { on_host } => {
                make_directory(root, &self.path)?;
                show(root, &self.path, on_host)
            }
            Kind::File { on_host } => {
                let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
                drop(openat(root, &*self.path, flags, Mode::from_raw_mode(0o444))?);
                show(root, &self.path, on_host)
            }
        }
    }
}

fn make_directory(root: &OwnedFd, path: &CStr) -> io::Result<()> {
    match mkdirat(root, path, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Mounts the tree at `on_host`, with everything mounted below it, read-only.
fn show(root: &OwnedFd, path: &CStr, on_host: &CStr) -> io::Result<()> {
    let clone = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = rustix::mount::open_tree(CWD, on_host, clone)?;
    root::set_attributes(tree.as_fd(), root::READ_ONLY, true)?;
    root::attach_below(tree.as_fd(), root.as_fd(), path)
}

/// A `/proc` with processes only, and of those only what the program could trace: itself.
fn show_proc(root: &OwnedFd) -> Result<(), JailError> {
    const STEP: &str = "mount the program's /proc";
    make_directory(root, c"proc").during(STEP)?;
    let context = fsopen(c"proc", FsOpenFlags::FSOPEN_CLOEXEC).during(STEP)?;
    fsconfig_set_string(context.as_fd(), c"hidepid", c"ptraceable").during(STEP)?;
    fsconfig_set_string(context.as_fd(), c"subset", c"pid").during(STEP)?;
    fsconfig_create(context.as_fd()).during(STEP)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let proc = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).during(STEP)?;
    root::attach_below(proc.as_fd(), root.as_fd(), c"proc").during(STEP)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(path: &str) -> Result<Option<Shown>, JailError> {
        Shown::look_at(Path::new(path))
    }

    #[test]
    fn only_plain_absolute_paths_are_shown() {
        for path in ["usr", "/", "/usr/../etc", ""] {
            assert!(matches!(shown(path), Err(JailError::Path(_))), "{path}");
        }
        assert!(shown("/no-such-directory/file").unwrap().is_none());
    }

    #[test]
    fn a_program_elsewhere_is_shown_with_what_came_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let bin = dir.path().join("bin");
        fs::create_dir(&bin).unwrap();
        fs::write(bin.join("program"), "").unwrap();
        let identity = identity::allocate().unwrap();
        let limits = crate::jail::sandbox_limits();
        let plan = Foreign::for_program(identity, limits, &bin.join("program")).unwrap();
        let last = plan.shown.last().unwrap();
        assert_eq!(last.path.as_bytes(), &dir.path().as_os_str().as_bytes()[1..]);
        assert_eq!(plan.shown.iter().filter(|shown| *shown.path == *c"usr").count(), 1);
    }

    #[test]
    fn directories_above_come_first() {
        let shown = shown("/proc/self/fd").unwrap().unwrap();
        assert_eq!(shown.above, [c"proc".to_owned(), c"proc/self".to_owned()]);
        assert!(matches!(shown.kind, Kind::Directory { .. }));
    }
}
