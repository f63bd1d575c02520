//! The cgroup hierarchies that are mounted, and where the calling process is in each.
//!
//! A host may have version 1, a mount for each controller or group of controllers; version 2, one
//! mount; or both, with the controllers in version 1. Nothing is assumed about where they are
//! mounted: `/proc/self/cgroup` lists the hierarchies, `/proc/self/mountinfo` where each is.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A mounted hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hierarchy {
    /// Which controllers it has.
    pub kind: Kind,
    /// Where it is mounted.
    pub mount: PathBuf,
    /// The calling process's directory, below `mount`.
    pub own: PathBuf,
}

/// A hierarchy's controllers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Version 1: these, or one name, as in `name=systemd`.
    V1(Vec<String>),
    /// Version 2: what each directory's `cgroup.controllers` lists.
    V2,
}

impl Kind {
    /// Whether it is a hierarchy of version 1 that has this controller.
    pub fn is_version_1_of(&self, controller: &str) -> bool {
        matches!(self, Self::V1(controllers) if controllers.iter().any(|name| name == controller))
    }
}

/// Finds the hierarchies.
///
/// # Errors
/// There is no `/proc`.
pub fn find() -> io::Result<Vec<Hierarchy>> {
    let mounts = std::fs::read("/proc/self/mountinfo")?;
    let own = std::fs::read("/proc/self/cgroup")?;
    Ok(parse(&mounts, &own))
}

/// What `/proc/self/mountinfo` and `/proc/self/cgroup` say. Lines of no known form are passed over.
fn parse(mounts: &[u8], own: &[u8]) -> Vec<Hierarchy> {
    let mounts: Vec<Mount> = lines(mounts).filter_map(Mount::parse).collect();
    lines(own).filter_map(|line| locate(line, &mounts)).collect()
}

/// Finds the mount of a hierarchy by its line in `/proc/self/cgroup`.
fn locate(line: &[u8], mounts: &[Mount]) -> Option<Hierarchy> {
    let mut fields = line.splitn(3, |byte| *byte == b':');
    let (number, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let path = PathBuf::from(OsString::from_vec(path.to_vec()));
    let controllers: Vec<String> = String::from_utf8_lossy(controllers)
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect();
    let is_v2 = number == b"0" && controllers.is_empty();
    if !is_v2 && controllers.is_empty() {
        return None;
    }
    let fits = |mount: &&Mount| {
        mount.is_v2 == is_v2 && controllers.iter().all(|name| mount.options.contains(name))
    };
    let shows_own = |mount: &&Mount| path.starts_with(&mount.root);
    let fitting = || mounts.iter().filter(fits);
    let mount = fitting().find(shows_own).or_else(|| fitting().next())?;
    let below = path.strip_prefix(&mount.root).unwrap_or(Path::new(""));
    let is_plain = below.components().all(|part| matches!(part, Component::Normal(_)));
    let own = if is_plain { below } else { Path::new("") };
    Some(Hierarchy {
        kind: if is_v2 { Kind::V2 } else { Kind::V1(controllers) },
        mount: mount.point.clone(),
        own: mount.point.join(own),
    })
}

/// A line of mountinfo that is a cgroup's.
struct Mount {
    is_v2: bool,
    /// The directory of the hierarchy that is mounted.
    root: PathBuf,
    point: PathBuf,
    /// Those of the file system, controllers among them.
    options: Vec<String>,
}

impl Mount {
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let root = unescape(fields.nth(3)?);
        let point = unescape(fields.next()?);
        let mut after = fields.skip_while(|field| *field != b"-").skip(1);
        let is_v2 = match after.next()? {
            b"cgroup" => false,
            b"cgroup2" => true,
            _ => return None,
        };
        let options = String::from_utf8_lossy(after.nth(1)?).into_owned();
        let options = options.split(',').map(str::to_owned).collect();
        Some(Self { is_v2, root, point, options })
    }
}

/// Undoes the octal escapes of proc_pid_mountinfo(5).
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, after)) = rest.split_first() {
        let octal = |byte: &u8| (b'0'..=b'7').contains(byte);
        match after.get(..3) {
            Some(digits) if first == b'\\' && digits.iter().all(octal) => {
                let value =
                    digits.iter().fold(0u32, |sum, digit| sum * 8 + u32::from(digit - b'0'));
                bytes.push(u8::try_from(value).unwrap_or(b'?'));
                rest = &after[3..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|byte| *byte == b'\n').filter(|line| !line.is_empty())
}

/// The names on the way from `top` to `path`, which is below it: `top` first, `path` last.
pub fn way(top: &Path, path: &Path) -> Vec<PathBuf> {
    let mut way: Vec<PathBuf> =
        path.ancestors().take_while(|above| above.starts_with(top)).map(Path::to_owned).collect();
    way.reverse();
    way
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:5 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
";

    fn v1(names: &[&str]) -> Kind {
        Kind::V1(names.iter().map(|&name| name.to_owned()).collect())
    }

    fn hierarchy(kind: Kind, mount: &str, own: &str) -> Hierarchy {
        Hierarchy { kind, mount: mount.into(), own: own.into() }
    }

    #[test]
    fn hybrid_host_has_controllers_names_and_version_2() {
        let own = "9:name=systemd:/a.slice\n4:memory:/job/1\n3:cpu,cpuacct:/\n2:hugetlb:/\n0::/u\n";
        let expected = [
            hierarchy(
                v1(&["name=systemd"]),
                "/sys/fs/cgroup/systemd",
                "/sys/fs/cgroup/systemd/a.slice",
            ),
            hierarchy(v1(&["memory"]), "/sys/fs/cgroup/memory", "/sys/fs/cgroup/memory/job/1"),
            hierarchy(
                v1(&["cpu", "cpuacct"]),
                "/sys/fs/cgroup/cpu,cpuacct",
                "/sys/fs/cgroup/cpu,cpuacct",
            ),
            hierarchy(Kind::V2, "/sys/fs/cgroup/unified", "/sys/fs/cgroup/unified/u"),
        ];
        assert_eq!(parse(HYBRID.as_bytes(), own.as_bytes()), expected);
    }

    #[test]
    fn version_2_alone_is_one_hierarchy() {
        let mounts = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate\n";
        let found = parse(mounts.as_bytes(), b"0::/user.slice/s.scope\n");
        let own = "/sys/fs/cgroup/user.slice/s.scope";
        assert_eq!(found, [hierarchy(Kind::V2, "/sys/fs/cgroup", own)]);
    }

    #[test]
    fn part_of_a_hierarchy_may_be_mounted() {
        let mounts = "30 23 0:26 /docker/c1 /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n";
        for (own, expected) in [
            ("/docker/c1", "/sys/fs/cgroup/memory"),
            ("/docker/c1/in", "/sys/fs/cgroup/memory/in"),
            ("/elsewhere", "/sys/fs/cgroup/memory"),
            ("/../..", "/sys/fs/cgroup/memory"),
        ] {
            let found = parse(mounts.as_bytes(), format!("4:memory:{own}\n").as_bytes());
            assert_eq!(found[0].own, Path::new(expected), "{own}");
        }
    }

    #[test]
    fn this_hosts_hierarchies_are_directories_of_its_own() {
        for hierarchy in find().expect("proc") {
            assert!(hierarchy.own.join("cgroup.procs").exists(), "{hierarchy:?}");
        }
    }

    #[test]
    fn way_leads_from_the_mount_to_the_directory() {
        let way = way(Path::new("/m"), Path::new("/m/a/b"));
        assert_eq!(way, ["/m", "/m/a", "/m/a/b"].map(PathBuf::from));
    }

    fn escape(name: &str) -> String {
        name.replace('\\', "\\134").replace(' ', "\\040").replace('\n', "\\012")
    }

    proptest! {
        #[test]
        fn any_bytes_are_parsed_to_something_below_its_mount(
            mounts in prop::collection::vec(any::<u8>(), 0..400),
            own in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            for found in parse(&mounts, &own) {
                prop_assert!(found.own.starts_with(&found.mount));
            }
        }

        #[test]
        fn near_misses_are_parsed_too(
            mounts in "([0-9]{1,2} [0-9] 0:1 /[a. ]{0,3} /[ab\\\\0]{0,5} rw (shared:1 )?- cgroup2? [a ]{0,3} (rw|cpu|,){0,3}\n?){0,4}",
            own in "([0-2]:(cpu|,|name=a){0,2}:/?[a./]{0,6}\n){0,4}",
        ) {
            for found in parse(mounts.as_bytes(), own.as_bytes()) {
                prop_assert!(found.own.starts_with(&found.mount));
                let plain = found.own.components().all(|part| part != Component::ParentDir);
                prop_assert!(plain || found.mount.components().any(|p| p == Component::ParentDir));
            }
        }

        #[test]
        fn mount_points_of_any_name_are_found(name in "/[a-z \\\\\n0-9]{1,12}") {
            let mounts = format!("1 2 0:3 / {} rw - cgroup cgroup rw,pids\n", escape(&name));
            let found = parse(mounts.as_bytes(), b"8:pids:/x\n");
            prop_assert_eq!(found.len(), 1);
            prop_assert_eq!(&found[0].mount, Path::new(&name));
        }
    }
}
