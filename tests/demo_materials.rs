//! The scripts that bring the demo's root file system and project refuse what they cannot get, say
//! why, and leave nothing behind. That they bring what they promise is for `make demo` to show.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;
use std::process::Command;

#[test]
fn impossible_requests_are_refused_with_the_reason() {
    let cache = tempfile::tempdir().unwrap();
    for (script, arguments, status, reason) in [
        ("fetch-source", &["--turbo"][..], 2, "usage: demo/fetch-source [PACKAGE]"),
        ("fetch-source", &["zlib", "lmdb"], 2, "usage: demo/fetch-source [PACKAGE]"),
        ("fetch-source", &[""], 1, "not the name of a Debian package: "),
        ("fetch-source", &["../../etc"], 1, "not the name of a Debian package: ../../etc"),
        ("make-rootfs", &["--suite"], 2, "usage: demo/make-rootfs"),
        ("make-rootfs", &["--turbo"], 2, "usage: demo/make-rootfs"),
        (
            "make-rootfs",
            &["--suite", "no-such-suite"],
            1,
            "apt is configured for no archive with the suite no-such-suite",
        ),
    ] {
        let output = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo").join(script))
            .args(arguments)
            .env("XDG_CACHE_HOME", cache.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{script} {arguments:?}: {said}");
        assert!(said.contains(reason), "{script} {arguments:?}: {said}");
        assert!(output.stdout.is_empty(), "{script} {arguments:?} printed a folder");
    }
    assert_eq!(fs::read_dir(cache.path()).unwrap().count(), 0, "something was left in the cache");
}
