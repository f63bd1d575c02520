//! The guests that need no device: rings, processors, memory where nothing is, ends.

use std::io::{BufRead, BufReader};
use std::os::fd::OwnedFd;
use std::thread;

use kiln_selftest_guests::{
    Guest, MMIO_NOWHERE, RESET, RING_SPEED, RING_TRANSITIONS, SHUTDOWN, SMP, SPIN, TRIPLE_FAULT,
};
use kiln_vmm::config::{Entry, GuestEnd};
use kiln_vmm::kvm::KvmError;

use super::{kernel, machine, run};

const ENTRIES: [Entry; 2] = [Entry::Linux64, Entry::Pvh];

#[test]
fn a_guest_ends_in_its_own_way() {
    let ends: [(Guest, GuestEnd); 3] = [
        (SHUTDOWN, GuestEnd::Shutdown),
        (RESET, GuestEnd::Reset),
        (TRIPLE_FAULT, GuestEnd::TripleFault),
    ];
    for (guest, end) in ends {
        for entry in ENTRIES {
            let outcome = run(machine(1), guest, "", entry);
            assert_eq!(outcome.end, end, "{} {entry:?}", guest.name);
        }
    }
}

/// `SYSCALL` depends on the host: KVM on virtualisation hardware delivers it to ring 0, some
/// software-assisted KVM does not, which is for `kiln doctor` to find out. Whichever it is, the
/// guest must notice and say so in one line, and everything else must pass.
#[test]
fn rings_are_crossed() {
    for entry in ENTRIES {
        let mut outcome = run(machine(1), RING_TRANSITIONS, "", entry);
        let syscall = outcome.lines.pop().unwrap_or_default();
        assert!(syscall == "ok syscall" || syscall.starts_with("FAIL syscall: "), "{syscall}");
        assert_eq!(
            outcome.all_ok(),
            [
                "divide error",
                "invalid opcode",
                "privileged instruction",
                "page fault on read",
                "page fault on write",
                "page fault on ring 0's memory",
                "breakpoint",
                "interrupt from the local APIC",
                "interrupt from the timer",
                "interrupts held back",
            ]
        );
    }
}

#[test]
fn the_speed_of_ring_0_is_measured() {
    let outcome = run(machine(1), RING_SPEED, "tsc_khz=1000000", Entry::Auto);
    assert_eq!(outcome.end, GuestEnd::Shutdown);
    assert_eq!(outcome.lines.len(), 2, "{outcome:#?}");
    for (line, ring) in outcome.lines.iter().zip(["ring0", "ring3"]) {
        assert!(line.starts_with(&format!("{ring} instructions=")), "{line}");
        let (_, rate) = line.split_once(" per_second=").unwrap();
        assert!(rate.parse::<u64>().unwrap() > 0, "{line}");
    }
}

#[test]
fn nowhere_reads_as_ones_and_takes_writes() {
    let outcome = run(machine(1), MMIO_NOWHERE, "", Entry::Auto);
    let names = outcome.all_ok();
    assert_eq!(names, ["byte", "two bytes", "four bytes", "eight bytes", "write", "port"]);
}

#[test]
fn further_processors_start_and_are_interrupted() {
    for cpus in [1, 2, 5, 32] {
        let outcome = run(machine(cpus), SMP, &format!("mptable cpus={cpus}"), Entry::Auto);
        let names = outcome.all_ok();
        let count = |wanted| names.iter().filter(|name| **name == wanted).count();
        let others = usize::from(cpus) - 1;
        assert_eq!(count("mp table"), 1);
        assert_eq!((count("start of a CPU"), count("interrupt to a CPU")), (others, others));
        assert_eq!(count("no CPU started twice"), 1);
    }
}

#[test]
fn a_guest_that_never_ends_is_stopped() {
    let (output, guest_end) = std::io::pipe().unwrap();
    let mut machine = machine(1);
    machine.add_serial(None, Some(OwnedFd::from(guest_end))).unwrap();
    machine.boot(kernel(SPIN, "", Entry::Auto)).unwrap();
    let stopper = machine.stopper();
    let running = thread::spawn(move || machine.run());
    let first = BufReader::new(output).lines().next().unwrap().unwrap();
    assert_eq!(first, "ok spinning");
    stopper.stop();
    assert!(matches!(running.join().unwrap(), Err(KvmError::Stopped)));
}
