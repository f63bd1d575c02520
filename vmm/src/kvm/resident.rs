//! What the process of a machine keeps in memory beside its guest.
//!
//! Hundreds of sandboxes stand on a host, each with such a process: what only its start needed goes
//! again.

use std::ffi::c_void;

/// The size of the pages that are given back.
const PAGE: usize = 4096;

unsafe extern "C" {
    /// The first byte of the program in memory, by the linker.
    static __executable_start: u8;
    /// The first byte after its code, by the linker.
    static etext: u8;
}

/// Gives back the pages of the program's code and constants: most of them were for the start, and
/// what is needed from here on comes back from the page cache.
pub fn release_program() {
    let start = (&raw const __executable_start).addr().next_multiple_of(PAGE);
    let end = (&raw const etext).addr() / PAGE * PAGE;
    let Some(length) = end.checked_sub(start) else { return };
    // SAFETY: the range is of the program's file, mapped private and never written to, since it is
    // not writable: a page that is dropped reads the same when it comes back. A failure changes
    // nothing.
    unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
}
