//! Overlays of the host's directories, which a bundle names by path as it names what it binds: podman
//! has them for volumes with `:O` and for images that are mounted.
//!
//! So the host mounts them, and the guest gets them as it gets bind mounts. They have no place among the
//! host's mounts: only the file system process has them, and they go with it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

/// Mounts an overlay that is nowhere yet. A parameter without a value is a flag.
///
/// # Errors
/// As mount(2), with the kernel's own words where it has any.
pub fn mount(parameters: &[(String, Option<String>)]) -> io::Result<OwnedFd> {
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let explained = |error: rustix::io::Errno| explain(context.as_fd(), error.into());
    fsconfig_set_string(&context, "source", "overlay").map_err(explained)?;
    for (key, value) in parameters {
        let set = match value {
            Some(value) => fsconfig_set_string(&context, key, value),
            None => fsconfig_set_flag(&context, key),
        };
        set.map_err(|error| {
            let error = explained(error);
            let value = value.as_deref().unwrap_or_default();
            io::Error::new(error.kind(), format!("option {key}={value}: {error}"))
        })?;
    }
    fsconfig_create(&context).map_err(explained)?;
    Ok(fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?)
}

/// The error with the messages that the kernel has left in the file system context, if any.
fn explain(context: BorrowedFd<'_>, error: io::Error) -> io::Error {
    let mut messages = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) {
        let text = String::from_utf8_lossy(&buffer[..length]);
        // Each begins with its kind: error, warning or information.
        messages.push(text.trim_start_matches(['e', 'w', 'i']).trim().to_owned());
    }
    if messages.is_empty() {
        return error;
    }
    io::Error::new(error.kind(), format!("{} ({error})", messages.join("; ")))
}
