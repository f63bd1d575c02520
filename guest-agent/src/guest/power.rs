//! The end of the guest.

use rustix::mount::{UnmountFlags, unmount};

use crate::console;

/// Writes everything back, gives the share up and resets the machine, which its command line has end
/// it (`reboot=`). Nothing may run any more but the agent.
pub fn end() -> ! {
    rustix::fs::sync();
    // Lazily: what may still hold the share must not keep the guest alive.
    if let Err(error) = unmount(super::boot::SHARE, UnmountFlags::DETACH) {
        console::say(format_args!("unmount the share: {error}"));
    }
    rustix::fs::sync();
    console::say(format_args!("ending the guest"));
    // SAFETY: reboot(2) with a plain number; data has been written back.
    unsafe { libc::reboot(libc::RB_AUTOBOOT) };
    // It came back: the agent is not what it should be, and the kernel panics as PID 1 ends.
    std::process::exit(1);
}
