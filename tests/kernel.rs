//! The guest kernel, booted for real: does it hold what `kernel-config/` promises, is it without
//! what is left out, and does the description beside it tell the truth?
//!
//! It runs under QEMU's software CPU with an initramfs of busybox and a few of this machine's own
//! programs; `kernel/init.sh` makes the checks there and reports them on the serial console.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod initramfs;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use initramfs::{Initramfs, installed, run};

const INIT: &str = include_str!("kernel/init.sh");

/// Host programs that the checks need beyond busybox's, and the Debian package each comes from.
const PROGRAMS: &[(&str, &str)] = &[
    ("nft", "nftables"),
    ("ip", "iproute2"),
    ("unshare", "util-linux"),
    ("setpriv", "util-linux"),
    ("flock", "util-linux"),
    ("mke2fs", "e2fsprogs"),
    ("setfattr", "attr"),
    ("getfattr", "attr"),
    ("setfacl", "acl"),
    ("getfacl", "acl"),
];

/// What the guest's console said.
struct Report {
    console: String,
    release: String,
    config: BTreeMap<String, String>,
    scratch: Vec<u8>,
}

#[test]
fn what_builders_need_works_and_what_they_do_not_is_absent() {
    let report = boot();
    assert!(report.console.contains("\nchecks ended"), "no end of checks:\n{}", report.console);

    let expected = INIT.lines().filter(|line| line.starts_with("check_") && line.ends_with("() {"));
    let passed = report.console.lines().filter(|line| is_verdict(line, "passed")).count();
    let failed: Vec<&str> = report
        .console
        .lines()
        .filter(|line| is_verdict(line, "failed") || line.starts_with("| "))
        .collect();
    assert!(failed.is_empty(), "checks failed in the guest:\n{}", failed.join("\n"));
    assert_eq!(passed, expected.count(), "some checks did not report:\n{}", report.console);
    assert!(report.scratch.starts_with(b"written in the guest"), "the disk was not written");

    every_option_of_the_fragments_is_as_asked_for(&report.config);
    the_description_is_true(&report);
}

fn is_verdict(line: &str, verdict: &str) -> bool {
    line.strip_prefix("check ").is_some_and(|rest| rest.ends_with(verdict))
}

fn every_option_of_the_fragments_is_as_asked_for(config: &BTreeMap<String, String>) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel-config");
    let fragments = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path());
    let mut options = 0;
    for fragment in fragments.filter(|path| path.extension().is_some_and(|e| e == "config")) {
        let text = fs::read_to_string(&fragment).unwrap();
        for (name, wanted) in text.lines().filter_map(|line| line.split_once('=')) {
            if !name.starts_with("CONFIG_") {
                continue;
            }
            options += 1;
            let got = config.get(name).map_or("n", String::as_str);
            assert_eq!(got, wanted, "{name} of {}", fragment.display());
        }
    }
    assert!(options > 200, "only {options} options found in {}", folder.display());
}

fn the_description_is_true(report: &Report) {
    let path = kernel().with_file_name("vmlinux.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let description: BTreeMap<String, String> = serde_json::from_str(&text).unwrap();

    assert_eq!(description["kernel_release"], report.release);
    assert!(!description["source_version"].is_empty());
    assert_eq!(format!("\"{}\"", description["compiler"]), {
        // Kconfig notes which compiler it asked.
        report.config["CONFIG_CC_VERSION_TEXT"].replacen("gcc-12", "gcc", 1)
    });
    let sum = run(Command::new("sha256sum").stdin(File::open(kernel()).unwrap()));
    assert_eq!(description["sha256"], sum.split(' ').next().unwrap());
    let configuration = kernel().canonicalize().unwrap().with_file_name("config");
    let sum = run(Command::new("sha256sum").stdin(File::open(configuration).unwrap()));
    assert_eq!(description["config_hash"], sum.split(' ').next().unwrap());
}

#[test]
fn the_build_script_refuses_what_it_cannot_build_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let empty = folder.path().join("empty");
    fs::create_dir(&empty).unwrap();
    let no_tarball = folder.path().join("source.tar.xz");
    fs::write(&no_tarball, "not a tarball").unwrap();
    let (empty, no_tarball) = (empty.to_str().unwrap(), no_tarball.to_str().unwrap());

    for (arguments, status, reason) in [
        (vec!["--turbo"], 2, "unknown argument: --turbo"),
        (vec!["--jobs", "many"], 2, "--jobs: not a positive number: many"),
        (vec!["--source"], 2, "--source needs a value"),
        (vec!["--source", "/nowhere"], 1, "--source: no such file or directory: /nowhere"),
        (vec!["--source", empty], 1, "not a kernel source"),
        (vec!["--source", no_tarball], 1, "cannot unpack"),
        (vec!["--patches", empty], 1, "no *.patch file in"),
        (vec!["--with", "warp-drive"], 1, "neither one of (ia32,io-uring) nor a file: warp-drive"),
    ] {
        let output = build_script().args(&arguments).env("XDG_CACHE_HOME", folder.path()).output();
        let output = output.unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {said}");
        assert!(said.lines().last().unwrap_or("").contains(reason), "{arguments:?}: {said}");
    }
    let left: Vec<_> = fs::read_dir(folder.path().join("kiln/kernels"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_none_or(|extension| extension != "lock"))
        .collect();
    assert!(left.is_empty(), "refused builds left {left:?} behind");
}

fn build_script() -> Command {
    Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("kernel-config/build"))
}

fn kernel() -> PathBuf {
    initramfs::kernel(Path::new(env!("CARGO_MANIFEST_DIR")))
}

/// Boots the kernel with the checks and gives back what they said.
fn boot() -> Report {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);

    let compressible = "all work and no play\n".repeat(50_000);
    fs::create_dir_all(at("layer/directory")).unwrap();
    fs::write(at("layer/compressible"), &compressible).unwrap();
    fs::write(at("layer/directory/small"), "small").unwrap();
    run(Command::new("mkfs.erofs").arg("-zlz4").args([at("layer.erofs"), at("layer")]));
    assert!(fs::metadata(at("layer.erofs")).unwrap().len() < compressible.len() as u64 / 4);
    let sum = run(Command::new("sha256sum").stdin(File::open(at("layer/compressible")).unwrap()));
    File::create(at("scratch")).unwrap().set_len(1 << 20).unwrap();
    write_initramfs(&at("initramfs"), &sum);

    let disk = |options: &str, name: &str| {
        format!("if=none,format=raw,{options},file={}", at(name).display())
    };
    let devices = [
        ["-drive".to_owned(), disk("id=layer,readonly=on", "layer.erofs")],
        ["-drive".to_owned(), disk("id=scratch", "scratch")],
    ];
    let others = "-device virtio-blk-device,drive=layer -device virtio-blk-device,drive=scratch \
                  -netdev user,id=net,restrict=on -device virtio-net-device,netdev=net \
                  -device virtio-rng-device -device virtio-balloon-device \
                  -device virtio-serial-device -chardev null,id=hvc -device virtconsole,chardev=hvc";
    let others = others.split_whitespace().map(str::to_owned);
    let devices: Vec<String> = devices.into_iter().flatten().chain(others).collect();
    let console = initramfs::boot(&kernel(), &at("initramfs"), "", &devices);

    let mut scratch = Vec::new();
    File::open(at("scratch")).unwrap().take(64).read_to_end(&mut scratch).unwrap();
    Report {
        release: between(&console, "\nrelease ", "\n").to_owned(),
        config: between(&console, "\nconfig begins\n", "\nconfig ends")
            .lines()
            .filter_map(|line| line.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect(),
        console,
        scratch,
    }
}

fn between<'a>(text: &'a str, begin: &str, end: &str) -> &'a str {
    let start = text.find(begin).unwrap_or_else(|| panic!("no {begin:?} on the console:\n{text}"));
    let text = &text[start + begin.len()..];
    &text[..text.find(end).unwrap_or_else(|| panic!("no {end:?} on the console:\n{text}"))]
}

/// An initramfs with the checks as `/init`, busybox, and [`PROGRAMS`] with their libraries.
fn write_initramfs(path: &Path, sum_of_compressible: &str) {
    let mut content = Initramfs::new(INIT);
    for (program, package) in PROGRAMS {
        content.add_program(&Path::new("/usr/bin").join(program), &installed(program, package));
    }
    content.add_text("/expected/compressible.sha256", sum_of_compressible);
    content.write(path);
}
