//! The self-test guests on the kvm engine's machine, by both of their entries, on the real
//! `/dev/kvm` and with the real devices.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod devices;
mod net;
mod processors;
#[path = "../tap/mod.rs"]
mod tap;
mod vsock;

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kiln_selftest_guests::Guest;
use kiln_vmm::config::{Entry, GuestEnd};
use kiln_vmm::kvm::{Kernel, Machine, Vm};

/// A guest that takes this long hangs.
const DEADLINE: Duration = Duration::from_secs(400);

/// How a guest ended and what it said.
#[derive(Debug)]
struct Outcome {
    end: GuestEnd,
    lines: Vec<String>,
}

impl Outcome {
    /// The names of the checks that passed, all of which did.
    fn all_ok(&self) -> Vec<&str> {
        assert_eq!(self.end, GuestEnd::Shutdown, "{self:#?}");
        let names = self.lines.iter().map(|line| line.strip_prefix("ok "));
        names.collect::<Option<_>>().unwrap_or_else(|| panic!("{self:#?}"))
    }
}

/// A machine of 64 MiB, without devices.
fn machine(cpus: u8) -> Machine {
    let kvm = File::options().read(true).write(true).open("/dev/kvm");
    let vm = Vm::create(kvm.expect("these tests need /dev/kvm").into()).unwrap();
    Machine::new(vm, 64, cpus).unwrap()
}

fn kernel(guest: Guest, cmdline: &str, entry: Entry) -> Kernel {
    let mut image = tempfile::tempfile().unwrap();
    image.write_all(guest.image).unwrap();
    Kernel { image, initrd: None, cmdline: cmdline.into(), entry }
}

/// Runs a guest to its end on a machine that has its devices.
fn run(machine: Machine, guest: Guest, cmdline: &str, entry: Entry) -> Outcome {
    run_and_watch(machine, guest, cmdline, entry, |_| {})
}

/// The same; `watch` sees each line when it comes.
fn run_and_watch(
    mut machine: Machine,
    guest: Guest,
    cmdline: &str,
    entry: Entry,
    mut watch: impl FnMut(&str) + Send + 'static,
) -> Outcome {
    let (output, guest_end) = std::io::pipe().unwrap();
    machine.add_serial(None, Some(OwnedFd::from(guest_end))).unwrap();
    machine.boot(kernel(guest, cmdline, entry)).unwrap();
    let lines = thread::spawn(move || {
        let lines = BufReader::new(output).lines().map(Result::unwrap);
        lines.inspect(|line| watch(line)).collect::<Vec<_>>()
    });
    let stopper = machine.stopper();
    let (ended, wait) = mpsc::channel::<()>();
    let deadline = thread::spawn(move || {
        if wait.recv_timeout(DEADLINE) == Err(mpsc::RecvTimeoutError::Timeout) {
            stopper.stop();
        }
    });
    let end = machine.run();
    drop(ended);
    deadline.join().unwrap();
    let lines = lines.join().unwrap();
    let end = end.unwrap_or_else(|error| panic!("{} {entry:?}: {error}\n{lines:#?}", guest.name));
    Outcome { end, lines }
}
