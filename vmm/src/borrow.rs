//! rustix wants descriptors that know who owns them; the rust-vmm crates' types predate that.

use std::os::fd::{AsRawFd, BorrowedFd};

/// Borrows the descriptor of a value that owns it.
pub(crate) fn borrow_fd<T: AsRawFd>(owner: &T) -> BorrowedFd<'_> {
    // SAFETY: `owner` keeps its descriptor open at least as long as it is borrowed: this is only
    // called with types that own theirs.
    unsafe { BorrowedFd::borrow_raw(owner.as_raw_fd()) }
}
