//! `kiln vm run`.

use std::process::Stdio;

use crate::stage::{Stage, errors, lib_dir};

/// kiln's own kernel without a root file system: it panics, and `panic=-1` resets the machine by a
/// triple fault, which is how an x86 kernel without firmware does it.
#[test]
fn emulated_kernel_talks_on_standard_output_and_its_end_is_told() {
    let stage = Stage::new(&["true"]);
    let output = stage
        .kiln()
        .args(["vm", "run", "--engine", "emulated", "--memory", "256", "--kernel"])
        .arg(lib_dir().join("vmlinux"))
        .args(["--cmdline", "console=ttyS0 panic=-1 reboot=t"])
        .stdin(Stdio::null())
        .output()
        .expect("kiln runs");
    let console = String::from_utf8_lossy(&output.stdout);
    assert!(console.contains("Linux version"), "{console}{}", errors(&output));
    assert!(console.contains("Unable to mount root fs"), "{console}");
    assert_eq!(output.status.code(), Some(3), "{}", errors(&output));
    assert!(errors(&output).contains("triple-faulted"), "{}", errors(&output));
    assert!(stage.is_clean());
}

#[test]
fn file_that_is_no_kernel_is_refused() {
    let stage = Stage::new(&["true"]);
    let output = stage
        .kiln()
        .args(["vm", "run", "--engine", "emulated", "--kernel", "/etc/passwd"])
        .stdin(Stdio::null())
        .output()
        .expect("kiln runs");
    assert_eq!(output.status.code(), Some(1), "{}", errors(&output));
    assert!(errors(&output).contains("kernel"), "{}", errors(&output));
}
