//! `kiln vmm`: the process of the kvm engine, as the monitor starts it.

#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test fails by panicking")]

mod process;
#[path = "../../vmm/tests/tap/mod.rs"]
mod tap;

use std::time::{Duration, Instant};

use kiln_selftest_guests as guests;
use kiln_vmm::config::{
    GuestEnd, InheritedFd, JailConfig, MachineConfig, NetConfig, RateConfig, VmmEvent,
};
use nix::sys::resource::{Resource, setrlimit};
use process::{Vmm, file_of, inherited};

/// How long what should happen at once may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn the_monitor_is_told_how_the_guest_ended() {
    let ends = [
        (guests::SHUTDOWN, GuestEnd::Shutdown),
        (guests::RESET, GuestEnd::Reset),
        (guests::TRIPLE_FAULT, GuestEnd::TripleFault),
    ];
    for (guest, how) in ends {
        let mut vmm = Vmm::start(guest.image, 1);
        assert_eq!(vmm.event(), Some(VmmEvent::Running), "{}", guest.name);
        assert_eq!(vmm.event(), Some(VmmEvent::Ended { how }), "{}", guest.name);
        assert_eq!(vmm.event(), None);
        assert!(vmm.wait().success());
    }
}

/// The threads of a machine with three processors, a console and no disk.
const THREADS: [&str; 7] = ["kiln-vmm", "serial", "storage", "streams", "vcpu0", "vcpu1", "vcpu2"];

#[test]
fn it_runs_its_guest_without_privileges_and_ends_with_its_monitor() {
    let mut vmm = Vmm::start(guests::SPIN.image, 3);
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    vmm.wait_for_line();
    assert_eq!(vmm.status_line("CapEff"), "0000000000000000");
    assert_eq!(vmm.status_line("CapBnd"), "0000000000000000");
    assert_eq!(vmm.status_line("NoNewPrivs"), "1");
    assert_eq!(vmm.status_line("Seccomp"), "2");
    assert_eq!(vmm.status_line("Uid"), "65000 65000 65000 65000");
    // A thread has its name only once it runs.
    let begin = Instant::now();
    while vmm.thread_names() != THREADS {
        assert!(begin.elapsed() < PATIENCE, "{:?}", vmm.thread_names());
        std::thread::sleep(Duration::from_millis(10));
    }
    let (ours, _) = std::io::pipe().unwrap();
    vmm.control = ours.into();
    vmm.wait();
}

#[test]
fn frames_pass_a_tap_that_it_was_handed() {
    let tap = tap::in_a_new_namespace(1500);
    let wire = tap::Wire::of(tap::EXPERIMENTAL);
    let mac = [2, 0, 0, 0, 0, 8];
    let mut vmm = Vmm::start_with(guests::NET.image, 1, |config| {
        config.boot.cmdline = format!("net_frames={}", 2 * tap::LENGTHS.len());
        config.nets.push(NetConfig {
            tap: inherited(&tap),
            mac,
            mtu: Some(1400),
            receive: RateConfig::default(),
            transmit: RateConfig::default(),
        });
    });
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    assert_eq!(tap::exchange(&wire), (mac, 1400));
    assert_eq!(vmm.event(), Some(VmmEvent::Ended { how: GuestEnd::Shutdown }));
    assert!(vmm.wait().success());
}

#[test]
fn what_is_wrong_is_said_once_and_whole() {
    let mut vmm = Vmm::start(b"#!/bin/sh", 1);
    let not_elf = "kernel: it is not an ELF file".to_owned();
    let failed = vmm.event();
    assert!(
        matches!(&failed, Some(VmmEvent::Failed { message }) if message.starts_with(&not_elf)),
        "{failed:?}"
    );
    assert_eq!(vmm.event(), None);
    assert_eq!(vmm.wait().code(), Some(1));

    type Change = fn(&mut MachineConfig);
    let refusals: [(Change, &str); 5] = [
        (|config| config.cpus = 33, "33 vCPUs: it must be between 1 and 32"),
        (|config| config.memory_mib = 0, "guest memory of 0 MiB"),
        (|config| config.boot.kernel = config.kvm, "is named twice"),
        (|config| config.nets.push(no_tap()), "network device 0: the descriptor is no tap"),
        (|config| config.boot.kernel = InheritedFd(1000), "descriptor 1000 of the configuration"),
    ];
    for (change, reason) in refusals {
        let mut vmm = Vmm::start_with(guests::SHUTDOWN.image, 1, change);
        let failed = vmm.event();
        assert!(
            matches!(&failed, Some(VmmEvent::Failed { message }) if message.contains(reason)),
            "{reason}: {failed:?}"
        );
        assert_eq!(vmm.wait().code(), Some(1));
    }
}

#[test]
fn too_few_processes_for_its_user_are_told() {
    // It binds who isn't root: the process that this starts, once it has a user of its own.
    setrlimit(Resource::RLIMIT_NPROC, 3, 3).unwrap();
    let user = JailConfig { uid: 61_235, gid: 61_235 };
    let mut vmm = Vmm::start_with(guests::SPIN.image, 8, |config| config.jail = user);
    let failed = std::iter::from_fn(|| vmm.event()).find_map(|event| match event {
        VmmEvent::Failed { message } => Some(message),
        _ => None,
    });
    let message = failed.expect("a failure");
    assert!(message.contains("thread") && message.contains("os error 11"), "{message}");
    assert_eq!(vmm.wait().code(), Some(1));
}

/// A network device whose tap is none.
fn no_tap() -> NetConfig {
    let (receive, transmit) = (RateConfig::default(), RateConfig::default());
    // Stays open until the process has started, and is closed with this one.
    let file = Box::leak(Box::new(file_of(&[])));
    NetConfig { tap: inherited(file), mac: [2, 0, 0, 0, 0, 9], mtu: None, receive, transmit }
}

#[test]
fn a_guest_that_kvm_cannot_run_is_described() {
    // In protected mode, by PVH, and 64-bit alike: a jump to where no memory is.
    let mut vmm = Vmm::start(&jump_to_nowhere(), 1);
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    let ended = vmm.event();
    let Some(VmmEvent::Ended { how: GuestEnd::Broken { reason, registers } }) = ended else {
        panic!("{ended:?}")
    };
    assert!(reason.contains("KVM_EXIT_INTERNAL_ERROR"), "{reason}");
    assert!(registers.iter().any(|line| line.starts_with("rip ")), "{registers:#?}");
    vmm.wait();
}

/// An ELF of one segment at 1 MiB: `mov eax, 0xe0000000; jmp rax`.
fn jump_to_nowhere() -> Vec<u8> {
    const LOAD: u64 = 0x10_0000;
    let code = [0xb8, 0, 0, 0, 0xe0, 0xff, 0xe0];
    let mut image = b"\x7fELF\x02\x01\x01".to_vec();
    image.resize(16, 0);
    image.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    image.extend(LOAD.to_le_bytes());
    image.extend(64u64.to_le_bytes());
    image.extend([0; 12]);
    image.extend([64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    image.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for field in [120, LOAD, LOAD, code.len() as u64, code.len() as u64, 16] {
        image.extend(field.to_le_bytes());
    }
    image.extend(code);
    image
}
