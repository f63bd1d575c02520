//! What `linux.cgroupsPath` asks for.
//!
//! As with runc: an absolute path is below the mount point of each hierarchy, a relative one below
//! the caller's own cgroup. With `--systemd-cgroup`, `slice:prefix:name` names a scope that systemd
//! makes; any other form is a path all the same. `..` never leads above the top.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where a sandbox's cgroup is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Wanted {
    /// No path is given: below the caller's own, after the container's id.
    Default,
    /// A path, without `.` and `..`.
    Path(PathBuf),
    /// A scope of systemd's.
    Scope(Scope),
}

/// A unit of systemd's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scope {
    /// The slice that it is in.
    pub slice: String,
    /// Its own name.
    pub unit: String,
}

impl Wanted {
    /// Reads `linux.cgroupsPath`; `systemd` says that systemd is to make the cgroup of container `id`.
    ///
    /// # Errors
    /// The reason for which it is refused.
    pub fn parse(path: Option<&Path>, systemd: bool, id: &str) -> Result<Self, String> {
        let given = path.filter(|path| !path.as_os_str().is_empty());
        let Some(path) = given else {
            let scope = Scope { slice: String::new(), unit: format!("kiln-{id}.scope") };
            return Ok(if systemd { Self::Scope(scope.in_a_slice()) } else { Self::Default });
        };
        if let Some(text) = path.to_str().filter(|_| systemd)
            && let [slice, prefix, name] = text.split(':').collect::<Vec<_>>()[..]
        {
            return Scope::parse(slice, prefix, name).map(Self::Scope);
        }
        let clean = clean(path);
        if clean.file_name().is_none() {
            return Err(format!("{path:?} names the root cgroup: name one below it"));
        }
        Ok(Self::Path(clean))
    }
}

impl Scope {
    fn parse(slice: &str, prefix: &str, name: &str) -> Result<Self, String> {
        if name.is_empty() {
            return Err("has no name after its last colon: use slice:prefix:name".to_owned());
        }
        if [slice, prefix, name].iter().any(|part| part.contains('/')) {
            return Err("has a slash in the name of a unit: use slice:prefix:name".to_owned());
        }
        let unit = match prefix {
            _ if name.ends_with(".slice") => name.to_owned(),
            "" => format!("{name}.scope"),
            _ => format!("{prefix}-{name}.scope"),
        };
        let scope = Self { slice: slice.to_owned(), unit }.in_a_slice();
        match scope.slice.strip_suffix(".slice") {
            Some("-") => Ok(scope),
            Some(stem) if !stem.is_empty() && stem.split('-').all(|part| !part.is_empty()) => {
                Ok(scope)
            }
            _ => Err(format!("{slice:?} is no name of a slice: use one like system.slice")),
        }
    }

    fn in_a_slice(self) -> Self {
        if self.slice.is_empty() { Self { slice: "system.slice".to_owned(), ..self } } else { self }
    }

    /// Where systemd puts it: a slice `a-b.slice` is in `a.slice`.
    pub fn path(&self) -> PathBuf {
        let mut path = PathBuf::from("/");
        let stem = self.slice.strip_suffix(".slice").unwrap_or(&self.slice);
        if stem != "-" {
            let ends = stem.match_indices('-').map(|(end, _)| end).chain([stem.len()]);
            path.extend(ends.map(|end| format!("{}.slice", &stem[..end])));
        }
        path.join(&self.unit)
    }
}

fn clean(path: &Path) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                clean.pop();
            }
            Component::Normal(_) | Component::RootDir => clean.push(part),
            Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn parse(path: &str, systemd: bool) -> Result<Wanted, String> {
        Wanted::parse(Some(Path::new(path)), systemd, "c1")
    }

    #[test]
    fn paths_are_kept_and_never_lead_above_the_top() {
        for (path, expected) in [
            ("/libpod_parent/libpod-1", "/libpod_parent/libpod-1"),
            ("kubepods/pod1/c1", "kubepods/pod1/c1"),
            ("/a/./b//c/", "/a/b/c"),
            ("/../../x", "/x"),
            ("../../x", "x"),
        ] {
            for systemd in [false, true] {
                let found = parse(path, systemd);
                assert_eq!(found, Ok(Wanted::Path(expected.into())), "{path}");
            }
        }
        assert_eq!(Wanted::parse(None, false, "c1"), Ok(Wanted::Default));
        assert_eq!(parse("", false), Ok(Wanted::Default));
        assert!(parse("/", false).is_err() && parse("a/..", false).is_err());
    }

    #[test]
    fn scopes_are_where_systemd_puts_them() {
        for (path, expected) in [
            ("system.slice:docker:1", "/system.slice/docker-1.scope"),
            (":cri-containerd:1", "/system.slice/cri-containerd-1.scope"),
            ("a-b-c.slice:crio:1", "/a.slice/a-b.slice/a-b-c.slice/crio-1.scope"),
            ("-.slice:x:1", "/x-1.scope"),
            ("machine.slice::1", "/machine.slice/1.scope"),
        ] {
            let Ok(Wanted::Scope(scope)) = parse(path, true) else { panic!("{path}") };
            assert_eq!(scope.path(), Path::new(expected), "{path}");
        }
        let Ok(Wanted::Scope(scope)) = Wanted::parse(None, true, "c1") else { panic!("no scope") };
        assert_eq!(scope.path(), Path::new("/system.slice/kiln-c1.scope"));
        for path in ["system:x:1", "a--b.slice:x:1", ".slice:x:1", "a.slice:x:", "a.slice:x:../1"] {
            assert!(parse(path, true).is_err(), "{path}");
        }
        assert!(matches!(parse("system.slice:docker:1", false), Ok(Wanted::Path(_))));
    }

    proptest! {
        #[test]
        fn nothing_names_a_place_above_the_top(path in "[a./:-]{0,20}(slice)?[:a./]{0,8}", systemd: bool) {
            let relative = match parse(&path, systemd) {
                Ok(Wanted::Path(path)) => path,
                Ok(Wanted::Scope(scope)) => scope.path(),
                Ok(Wanted::Default) | Err(_) => return Ok(()),
            };
            let below = relative.strip_prefix("/").unwrap_or(&relative);
            prop_assert!(below.components().count() > 0);
            prop_assert!(below.components().all(|part| matches!(part, Component::Normal(_))));
        }
    }
}
