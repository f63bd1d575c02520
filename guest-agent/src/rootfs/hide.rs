//! Masked and read-only paths (`linux.maskedPaths`, `linux.readonlyPaths`).

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use kiln_protocol::FailurePhase;
use rustix::fs::FileType;

use super::tree::{self, Attributes};
use crate::failure::{During, Failure};
use kiln_rooted as resolve;

/// Makes `path` below `root` unreadable: a directory becomes an empty read-only one, anything else
/// becomes `null`. A path that does not exist needs no hiding.
///
/// # Errors
/// As openat2(2) and move_mount(2), with the field's name.
pub fn mask(root: BorrowedFd<'_>, path: &Path, null: &Path) -> Result<(), Failure> {
    existing(root, path, |target| {
        let is_directory =
            FileType::from_raw_mode(resolve::metadata(target)?.st_mode) == FileType::Directory;
        let cover = if is_directory {
            let cover = tree::new_file_system("tmpfs", "tmpfs", &[])?;
            tree::set_attributes(cover.as_fd(), Attributes::READ_ONLY, false)?;
            cover
        } else {
            tree::copy_of_path(null, false)?
        };
        tree::attach(cover.as_fd(), target)
    })
    .during(FailurePhase::Mounts, || format!("linux.maskedPaths ({})", path.display()))
}

/// Makes `path` below `root`, and what is mounted under it, read-only.
///
/// # Errors
/// As openat2(2) and mount_setattr(2), with the field's name.
pub fn make_read_only(root: BorrowedFd<'_>, path: &Path) -> Result<(), Failure> {
    existing(root, path, |target| {
        let copy = tree::copy(target, true)?;
        tree::set_attributes(copy.as_fd(), Attributes::READ_ONLY, true)?;
        tree::attach(copy.as_fd(), target)
    })
    .during(FailurePhase::Mounts, || format!("linux.readonlyPaths ({})", path.display()))
}

fn existing(
    root: BorrowedFd<'_>,
    path: &Path,
    change: impl FnOnce(BorrowedFd<'_>) -> io::Result<()>,
) -> io::Result<()> {
    match resolve::lookup(root, path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        found => change(found?.as_fd()),
    }
}
