//! The share: the one file system of the host's that the guest mounts.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use rustix::mount::{MountFlags, mount_remount};

use crate::container::launch::clone_process;

/// Mounts it, closed to everyone but root of the guest.
///
/// # Errors
/// As mount(2).
pub fn mount(at: &Path) -> io::Result<()> {
    DirBuilder::new().mode(0o700).recursive(true).create(at)?;
    let (tag, flags) = (kiln_protocol::SHARE_TAG, MountFlags::empty());
    Ok(rustix::mount::mount(tag, at, "virtiofs", flags, None::<&std::ffi::CStr>)?)
}

/// Has the kernel forget the files that nobody uses any more, of which the host keeps some open for
/// as long as it is told so. What a container that has ended has used may then go there.
///
/// It may take as long as the host needs to write, so a process of its own does it.
pub fn forget_unused(at: &Path) {
    // SAFETY: the child gets a copy of the whole address space, like a child of fork(2), and never
    // returns from this branch. A guest without memory for it keeps the files.
    if matches!(unsafe { clone_process(0, libc::SIGCHLD) }, Ok(0)) {
        // A remount drops what the kernel has cached of names that are not in use
        // (fs/super.c:reconfigure_super), and with them the files.
        let forgotten = mount_remount(at, MountFlags::empty(), c"");
        // SAFETY: takes a number and doesn't return; nothing of the agent's copy is run.
        unsafe { libc::_exit(forgotten.is_err().into()) };
    }
}
