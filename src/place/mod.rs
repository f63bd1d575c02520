//! Where a sandbox's processes stand on the host, as callers look it up below `/proc/PID`.
//!
//! A caller of runc knows a container by a process, and takes for granted that this process is in the
//! container's namespaces. The monitor is that process here, so it goes there, before it starts
//! anything else:
//!
//! * [`crate::cgroup`]: the cgroup that the bundle names;
//! * [`namespaces`]: joined where the bundle names one, new where it only asks for one;
//! * [`oom`]: the score by which the host's OOM killer chooses;
//! * [`overlay`]: overlays of the host's directories, for the guest's files;
//! * [`rootfs`]: the container's root file system, once everything is opened and started.
//!
//! It also gives up there what it has no use for, as those that stand for execs do: [`restraint`].
//!
//! What a sandbox is isolated by is its machine. None of this is needed for that, so a caller who
//! may not have it all does without, and is told so in the log.

pub mod namespaces;
pub mod oom;
pub mod overlay;
pub mod restraint;
pub mod rootfs;
