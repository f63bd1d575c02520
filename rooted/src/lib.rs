//! Paths inside a root file system that is not trusted.
//!
//! Two ways in, neither of which leaves the root whatever symbolic links lie on the way:
//!
//! * [`lookup`] finds what exists, with openat2(2) and `RESOLVE_IN_ROOT`.
//! * [`ensure`] also creates what is missing. It walks the path itself, one component at a time, each
//!   opened without following links, keeping the directories above on a stack: a link's target is
//!   put in front of what remains, an absolute one starts again at the root, and `..` pops the stack
//!   and stays at the root. So the target of a dangling link is created where the container will
//!   look for it.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Stat};
use rustix::io::Errno;

/// Links followed in one path before it is a loop (`MAXSYMLINKS` of the kernel).
const MAX_LINKS: usize = 40;

/// What a path is to lead to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory, created with mode 0755.
    Directory,
    /// Anything else, created as an empty file with mode 0644.
    File,
}

/// Opens what exists at `path` inside `root`, without access to its content (`O_PATH`).
///
/// # Errors
/// `ENOENT`, `ENOTDIR`, `ELOOP`, ... as openat2(2).
pub fn lookup(root: BorrowedFd<'_>, path: &Path) -> io::Result<OwnedFd> {
    open(root, path, OFlags::PATH)
}

/// Opens what exists at `path` inside `root`.
///
/// # Errors
/// As openat2(2).
pub fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(root, relative(path), flags, Mode::empty(), resolve)?)
}

/// Opens `path` inside `root` (`O_PATH`), creating it and the directories above it where missing.
///
/// # Errors
/// `ELOOP` for more than 40 links, `ENOTDIR` for a file on the way, and what mkdirat(2) and
/// openat(2) say.
pub fn ensure(root: BorrowedFd<'_>, path: &Path, kind: Kind) -> io::Result<OwnedFd> {
    let mut above = Vec::new();
    let mut current = root.try_clone_to_owned()?;
    let mut remaining = components(path.as_os_str());
    let mut links = 0;
    while let Some(name) = remaining.pop_front() {
        if name == ".." {
            current = above.pop().unwrap_or(current);
            continue;
        }
        let kind = if remaining.is_empty() { kind } else { Kind::Directory };
        let next = open_or_create(current.as_fd(), &name, kind)?;
        match FileType::from_raw_mode(rustix::fs::fstat(&next)?.st_mode) {
            FileType::Symlink => {
                links += 1;
                if links > MAX_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = rustix::fs::readlinkat(&next, c"", Vec::new())?;
                let target = OsString::from_vec(target.into_bytes());
                if target.as_bytes().starts_with(b"/") {
                    above.clear();
                    current = root.try_clone_to_owned()?;
                }
                let mut ahead = components(&target);
                ahead.append(&mut remaining);
                remaining = ahead;
            }
            FileType::Directory => above.push(std::mem::replace(&mut current, next)),
            _ if remaining.is_empty() => return Ok(next),
            _ => return Err(Errno::NOTDIR.into()),
        }
    }
    Ok(current)
}

/// Like [`ensure`] for the directory above `path`; gives it with the path's last component.
///
/// # Errors
/// As [`ensure`]; `EINVAL` for a path without a last component.
pub fn ensure_parent<'p>(root: BorrowedFd<'_>, path: &'p Path) -> io::Result<(OwnedFd, &'p OsStr)> {
    let name = path.file_name().ok_or(Errno::INVAL)?;
    let parent = path.parent().unwrap_or(Path::new("/"));
    Ok((ensure(root, parent, Kind::Directory)?, name))
}

/// Metadata of an open file.
///
/// # Errors
/// As fstat(2).
pub fn metadata(file: BorrowedFd<'_>) -> io::Result<Stat> {
    Ok(rustix::fs::statat(file, c"", AtFlags::EMPTY_PATH)?)
}

fn open_or_create(parent: BorrowedFd<'_>, name: &OsStr, kind: Kind) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(parent, name, flags, Mode::empty()) {
        Err(Errno::NOENT) => {}
        opened => return Ok(opened?),
    }
    let created = match kind {
        Kind::Directory => rustix::fs::mkdirat(parent, name, Mode::from_raw_mode(0o755)),
        Kind::File => {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644)).map(drop)
        }
    };
    match created {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

fn components(path: &OsStr) -> VecDeque<OsString> {
    path.as_bytes()
        .split(|byte| *byte == b'/')
        .filter(|name| !name.is_empty() && *name != b".")
        .map(|name| OsString::from_vec(name.to_vec()))
        .collect()
}

fn relative(path: &Path) -> &OsStr {
    let bytes = path.as_os_str().as_bytes();
    let start = bytes.iter().position(|byte| *byte != b'/').unwrap_or(bytes.len());
    if start == bytes.len() { OsStr::new(".") } else { OsStr::from_bytes(&bytes[start..]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn root() -> (tempfile::TempDir, OwnedFd) {
        let dir = tempfile::tempdir().expect("temporary directory");
        fs::create_dir(dir.path().join("root")).expect("root");
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::open(dir.path().join("root"), flags, Mode::empty()).expect("opens");
        (dir, fd)
    }

    #[test]
    fn missing_directories_and_file_are_created() {
        let (dir, root) = root();
        ensure(root.as_fd(), Path::new("/a/b/c"), Kind::File).expect("creates");
        assert!(dir.path().join("root/a/b/c").is_file());
        ensure(root.as_fd(), Path::new("/a/d/"), Kind::Directory).expect("creates");
        assert!(dir.path().join("root/a/d").is_dir());
    }

    #[test]
    fn links_that_point_out_stay_inside() {
        let (dir, root) = root();
        let inside = dir.path().join("root");
        symlink("/outside", inside.join("absolute")).expect("symlink");
        symlink("../../../outside2", inside.join("relative")).expect("symlink");
        for link in ["absolute", "relative"] {
            ensure(root.as_fd(), &Path::new(link).join("x"), Kind::Directory).expect("creates");
        }
        assert!(inside.join("outside/x").is_dir());
        assert!(inside.join("outside2/x").is_dir());
        assert!(!Path::new("/outside").exists());
        assert!(!dir.path().join("outside2").exists());
    }

    #[test]
    fn dangling_link_to_a_file_is_filled_in_where_it_points() {
        let (dir, root) = root();
        let inside = dir.path().join("root");
        fs::create_dir(inside.join("etc")).expect("etc");
        symlink("../run/systemd/resolv.conf", inside.join("etc/resolv.conf")).expect("symlink");
        ensure(root.as_fd(), Path::new("/etc/resolv.conf"), Kind::File).expect("creates");
        assert!(inside.join("run/systemd/resolv.conf").is_file());
    }

    #[test]
    fn loops_and_files_on_the_way_are_refused() {
        let (dir, root) = root();
        let inside = dir.path().join("root");
        symlink("b", inside.join("a")).expect("symlink");
        symlink("a", inside.join("b")).expect("symlink");
        let error = ensure(root.as_fd(), Path::new("/a/x"), Kind::File).expect_err("loop");
        assert_eq!(error.raw_os_error(), Some(libc::ELOOP));
        fs::write(inside.join("file"), "").expect("file");
        let error = ensure(root.as_fd(), Path::new("/file/x"), Kind::File).expect_err("not a dir");
        assert_eq!(error.raw_os_error(), Some(libc::ENOTDIR));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn nothing_appears_outside_the_root(
            links in prop::collection::vec(("[ab]{1,2}", "(/|\\.\\./){0,3}[abc/.]{1,6}"), 0..5),
            path in "(\\.\\./|/)?([abc]{1,2}/|\\.\\./){0,5}[abc]",
        ) {
            let (dir, root) = root();
            for (name, target) in &links {
                let _ = symlink(target, dir.path().join("root").join(name));
            }
            let made = ensure(root.as_fd(), Path::new(&path), Kind::Directory);
            let names: Vec<_> = fs::read_dir(dir.path()).expect("readable")
                .map(|entry| entry.expect("entry").file_name()).collect();
            prop_assert_eq!(names, vec![OsString::from("root")]);
            if made.is_ok() {
                prop_assert!(lookup(root.as_fd(), Path::new(&path)).is_ok());
            }
        }
    }
}
