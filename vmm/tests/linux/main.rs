//! A real Linux kernel on the kvm engine's machine: its own drivers find, negotiate with and use the
//! machine's devices.
//!
//! Not every KVM runs a whole Linux. One that emulates the guest's kernel in software lacks a few
//! instructions, of which one, `int3`, no kernel option avoids: this test delivers that breakpoint
//! for it, and tells the kernel to do without the others. Where even user space doesn't run
//! (`SYSCALL` doesn't reach the kernel, as the self-test guest finds), the test ends when the kernel
//! starts its first process; everywhere else the process must run.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod breakpoint;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use kiln_selftest_guests as guests;
use kiln_vmm::config::{Entry, GuestEnd};
use kiln_vmm::kvm::{DeviceGroup, Kernel, KvmError, Machine, Stopper, Vm};
use kiln_vmm::virtio::block::Block;
use kiln_vmm::virtio::rng::Rng;

/// What keeps a kernel from using what a software-assisted KVM doesn't emulate, from measuring the
/// speed of a processor that is emulated, and from doing more than it must. No other host minds.
const CAUTIOUS: &str = "noxsave clearcpuid=popcnt,cx16,smap,smep,fsgsbase,invpcid,rdpid,rdtscp,erms,\
                        sse4_2,avx2 nosmp lpj=10384584 mitigations=off";

/// Makes the kernel's time pass at about a tenth of its speed: an emulated kernel on a busy host
/// would otherwise do nothing but serve its timer's interrupts.
const SLOW_TIME: &str = "no-kvmclock tsc=reliable tsc_early_khz=26000000";

/// A kernel whose every instruction is emulated takes minutes on a busy host; one that hangs takes
/// for ever.
const DEADLINE: Duration = Duration::from_secs(840);

/// The guest kernel: `$KILN_LIB_DIR/vmlinux`, or where the build leaves it.
fn vmlinux() -> File {
    let directory = match std::env::var_os("KILN_LIB_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../out/lib/kiln"),
    };
    let path = directory.join("vmlinux");
    File::open(&path).unwrap_or_else(|error| {
        panic!(
            "no guest kernel at {}: {error}; build it (make kernel) or set KILN_LIB_DIR",
            path.display()
        )
    })
}

fn machine(memory_mib: u64) -> Machine {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let vm = Vm::create(kvm.expect("this test needs /dev/kvm").into()).unwrap();
    Machine::new(vm, memory_mib, 1).unwrap()
}

/// Whether user space runs under this host's KVM.
fn user_space_runs() -> bool {
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(guests::RING_TRANSITIONS.image).unwrap();
    let (output, guest_end) = std::io::pipe().unwrap();
    let mut machine = machine(64);
    machine.add_serial(None, Some(guest_end.into())).unwrap();
    let kernel = Kernel { image, initrd: None, cmdline: String::new(), entry: Entry::Auto };
    machine.boot(kernel).unwrap();
    let ended = machine.run();
    let lines: Vec<_> = BufReader::new(output).lines().map(Result::unwrap).collect();
    ended.is_ok() && lines.iter().any(|line| line == "ok syscall")
}

/// A file system with an init that says that it runs and restarts the machine.
fn root_image(directory: &Path) -> File {
    let tree = directory.join("root");
    for folder in ["bin", "dev", "proc"] {
        std::fs::create_dir_all(tree.join(folder)).unwrap();
    }
    std::fs::copy("/bin/busybox", tree.join("bin/busybox")).expect("busybox-static is needed");
    let init = tree.join("init");
    let script = "#!/bin/busybox sh\necho init runs\n/bin/busybox reboot -f\n";
    std::fs::write(&init, script).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&init, mode).unwrap();
    let image = directory.join("root.erofs");
    let made = Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree).output();
    let made = made.expect("mkfs.erofs is needed (erofs-utils)");
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    File::open(image).unwrap()
}

/// Stops a machine that outlives the deadline.
fn stop_after(deadline: Duration, stopper: Stopper) -> std::sync::mpsc::Sender<()> {
    let (ended, wait) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        if wait.recv_timeout(deadline) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            stopper.stop();
        }
    });
    ended
}

#[test]
fn a_kernel_mounts_its_root_from_the_block_device() {
    let user_space_runs = user_space_runs();
    let directory = tempfile::tempdir().unwrap();
    let mut machine = machine(128);
    let disk = Block::new(root_image(directory.path()), true, "root").unwrap();
    machine.add_device(Box::new(disk), DeviceGroup::Storage).unwrap();
    machine.add_device(Box::new(Rng::new()), DeviceGroup::Streams).unwrap();
    let (output, guest_end) = std::io::pipe().unwrap();
    machine.add_serial(None, Some(guest_end.into())).unwrap();
    machine.set_exit_hook(breakpoint::hook(machine.memory().clone()));
    let cmdline = format!(
        "console=ttyS0 panic=-1 reboot=k root=/dev/vda ro rootfstype=erofs init=/init {CAUTIOUS} {SLOW_TIME}"
    );
    machine
        .boot(Kernel { image: vmlinux(), initrd: None, cmdline, entry: Entry::Linux64 })
        .unwrap();

    let stopper = machine.stopper();
    let reading = std::thread::spawn(move || {
        let mut lines = Vec::new();
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            let _ = writeln!(std::io::stderr(), "guest: {line}");
            let started = line.contains("Run /init as init process");
            lines.push(line);
            if started && !user_space_runs {
                stopper.stop();
            }
        }
        lines
    });
    let ended = stop_after(DEADLINE, machine.stopper());
    let end = machine.run();
    drop(ended);
    let lines = reading.join().unwrap();

    let said = |text: &str| lines.iter().any(|line| line.contains(text));
    assert!(said("virtio_blk virtio0: [vda]"), "the driver did not find its disk: {end:?}");
    let mounted = "VFS: Mounted root (erofs filesystem) readonly on device";
    assert!(said(mounted), "the root was not mounted: {end:?}");
    assert!(said("Run /init as init process"), "no process was started: {end:?}");
    if user_space_runs {
        assert!(said("init runs"), "the process did not run: {end:?}");
        assert_eq!(end.unwrap(), GuestEnd::Reset);
    } else {
        assert!(matches!(end, Err(KvmError::Stopped)), "{end:?}");
    }
}
