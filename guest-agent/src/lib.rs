//! The agent of kiln's guests: PID 1, started by the kernel from its initial RAM disk.
//!
//! It mounts what a Linux system has, connects to the monitor on the host, and from then on does as it
//! is told over that connection ([`kiln_protocol`]): it sets containers up as the OCI runtime
//! specification has it, executes their programs, carries their stdio, and reports how they end. When
//! the connection ends, so does the guest.
//!
//! # What it promises
//! * A configuration is carried out as a whole or refused, by the name of the field and with the
//!   reason; nothing in it is passed over. What the monitor deals with on the host (`root.path`,
//!   `linux.cgroupsPath`, hooks that run there, `annotations`) is the exception.
//! * A container's processes cannot disturb it: it has its own cgroup with memory that is kept for it,
//!   the OOM killer never takes it, containers leave it process ids, and its files are in none of
//!   their mount namespaces.
//! * It does not block. The one thread waits in epoll and nowhere else, except for a few milliseconds
//!   while a container's last process leaves its cgroup or an exec is born, and while the kernel takes
//!   memory back for an update to a limit that is below what is in use.
//! * It holds one buffer of 64 KiB for each direction of a stream at most.
//!
//! # What it trusts
//! The host, which has the guest in its hand anyway; but frames have a length limit, and a message
//! that is none ends the connection. Not the root file system, nor anything that containers do.

pub mod cgroup;
pub mod console;
pub mod container;
pub mod failure;
pub mod guest;
pub mod network;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod server;
pub mod stream;
