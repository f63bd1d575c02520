//! What a guest writes to its console and its processes to standard error, in the log: as many lines as
//! explain a failure, and not as many as fill a disk.

use super::machine::Role;
use super::tail;

/// The most lines of a sandbox that are logged. A kernel that tells of its whole boot has a thousand.
const MOST_LINES: u32 = 20_000;

/// The lines that were logged.
#[derive(Debug, Default)]
pub struct Transcript {
    lines: u32,
}

impl Transcript {
    /// Logs what was written.
    pub fn log(&mut self, role: Role, bytes: &[u8]) {
        for line in String::from_utf8_lossy(bytes).lines() {
            if !self.admit(role) {
                return;
            }
            tracing::debug!(role = role.name(), "{}", tail::printable(line));
        }
    }

    /// Counts a line; says once that there are no more.
    fn admit(&mut self, role: Role) -> bool {
        if self.lines == MOST_LINES {
            tracing::debug!(role = role.name(), "the guest writes more than is logged");
        }
        self.lines = self.lines.saturating_add(1);
        self.lines <= MOST_LINES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_logged_up_to_the_limit() {
        let mut transcript = Transcript::default();
        assert_eq!((0..3 * MOST_LINES).filter(|_| transcript.admit(Role::Console)).count(), 20_000);
        transcript.lines = u32::MAX;
        assert!(!transcript.admit(Role::Qemu));
    }
}
