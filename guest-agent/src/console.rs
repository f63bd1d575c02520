//! What the agent says on the guest's console: one short line for each phase, so that a guest that
//! stops on its way says where.

use std::fmt::Arguments;
use std::io::Write;

/// Prints a line. The console is best effort: a guest without one works as well.
pub fn say(line: Arguments<'_>) {
    let _ = writeln!(std::io::stderr(), "kiln-agent: {line}");
}
