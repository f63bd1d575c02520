//! kiln: every container in a microVM of its own, with runc's command line.
fn main() {}
