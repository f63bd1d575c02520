//! How fast a guest's files are: kiln's fs backend beside Debian's `virtiofsd` (QEMU's, in C), in the
//! same run and with the same guest.
//!
//! Run as root with `KILN_LIB_DIR` naming the guest kernel's directory. The guest runs under QEMU's
//! software CPU, which takes most of the time: what is left between the two is the backends' part.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/fs_guest/mod.rs"]
mod fs_guest;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fs_guest::{FsProcess, Guest, program};

const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// How often each is measured, in turns.
const ROUNDS: usize = 3;

fn figures(lines: &[String]) -> String {
    let line = lines.iter().find_map(|line| line.strip_prefix("speed "));
    line.expect("the guest printed no figures").to_owned()
}

fn kiln(program: &Path) -> String {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let rootfs = tempfile::tempdir_in("/var/tmp").unwrap();
    let backend = FsProcess::start(directory.path(), rootfs.path(), &[]);
    let guest = Guest::boot(directory.path(), program, &backend.socket, "speed-rootfs");
    let lines = guest.run(|_| {});
    backend.wait();
    figures(&lines)
}

fn start_virtiofsd(socket: &Path, shared: &Path) -> Child {
    let mut command = Command::new(VIRTIOFSD);
    command.arg(format!("--socket-path={}", socket.display())).arg("-o");
    command.arg(format!("source={},cache=auto,xattr,posix_acl", shared.display()));
    command.stderr(Stdio::null());
    let child = command.spawn().expect("virtiofsd (package qemu-system-common) is needed");
    while !socket.exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    child
}

fn virtiofsd(program: &Path) -> String {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let shared = tempfile::tempdir_in("/var/tmp").unwrap();
    let socket = directory.path().join("virtiofsd.sock");
    let mut backend = start_virtiofsd(&socket, shared.path());
    let guest = Guest::boot(directory.path(), program, &socket, "speed-top-one-queue");
    let lines = guest.run(|_| {});
    backend.wait().unwrap();
    figures(&lines)
}

fn main() {
    let directory = tempfile::tempdir_in("/var/tmp").unwrap();
    let program = program(directory.path());
    println!("seconds: create, stat, unlink of 5,000 files; write and read of 64 MiB");
    for _ in 0..ROUNDS {
        println!("kiln       {}", kiln(&program));
        println!("virtiofsd  {}", virtiofsd(&program));
    }
}
