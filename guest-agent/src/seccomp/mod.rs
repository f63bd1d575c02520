//! Seccomp profiles of the OCI runtime specification (`linux.seccomp`), as libseccomp under runc
//! carries them out.
//!
//! A profile is compiled by the agent before the container's first process exists, so that every
//! mistake in it is reported when the container is created, and is installed by that process right
//! before it executes the program.
//!
//! # From a profile to a filter
//! `seccompiler` writes the comparisons; its filters know one action besides the default, and stacked
//! filters would judge each other's installation. So one filter is built of several of seccompiler's
//! programs: a section for each action that rules have (`ERRNO` once for each errno), the most
//! restrictive first. Where a section's rules don't match, its program goes on to the next section
//! instead of returning; behind the last one stands the default action.
//!
//! So where rules of different actions match the same call the most restrictive wins, but a rule
//! without arguments stands for its system call as a whole, as in libseccomp.
//!
//! # Where a filter can be evaded, and what is done about it
//! A system call that enters through another ABI has other numbers. The filter begins by killing
//! the process if the call is not of the x86-64 ABI, x32 included, whatever the profile says about
//! other architectures: `architectures` may name them, but a 32-bit program under a profile is
//! killed.
//!
//! # Numbers newer than the profile
//! runc answers system calls with a number above the highest in the profile with `ENOSYS` instead of
//! the default action, so that a C library falls back to what the author of the profile knew. The
//! same happens here, under the same conditions.
//!
//! # Refused
//! `SCMP_ACT_NOTIFY`, `listenerPath` and `listenerMetadata`: the listener is a process on the host.
//! Names that are no x86-64 system call are skipped, as runc skips them.

mod compile;
#[cfg(test)]
mod evaluate;
mod install;
mod profile;

pub use compile::compile;
pub use install::Filter;
pub use profile::{Action, Condition, Operator, Profile, Rule};
