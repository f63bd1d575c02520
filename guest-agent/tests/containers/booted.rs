//! Runs a test in a guest of its own, where it may do what this machine is not to have done to it.

use std::path::Path;

use crate::initramfs::{self, Initramfs};

/// The kernel's parameter that names the test, which the guest's programs have in their environment.
const PARAMETER: &str = "kiln_test";

/// Whether this is the guest.
pub fn is_guest() -> bool {
    std::env::var_os(PARAMETER).is_some()
}

/// Boots a guest in which the test of this name runs, and passes.
pub fn passes(test: &str) {
    let folder = tempfile::tempdir().expect("temporary directory");
    let program = folder.path().join("test");
    let own = std::env::current_exe().expect("this program");
    let strip = ["--strip-debug", "-o"].map(str::to_owned);
    initramfs::run(std::process::Command::new("strip").args(strip).arg(&program).arg(own));
    let mut content = Initramfs::new(include_str!("init.sh"));
    content.add_program(Path::new("/test"), &program);
    content.write(&folder.path().join("initramfs"));
    let kernel = initramfs::kernel(&Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    let parameter = format!("{PARAMETER}={test}");
    let console = initramfs::boot(&kernel, &folder.path().join("initramfs"), &parameter, &[]);
    assert!(console.contains("1 passed"), "{console}");
    assert!(console.contains("\ntest ended: 0"), "{console}");
}
