//! The guests that drive virtio devices: interrupts by irqfd, doorbells by ioeventfd, each device on
//! its own thread.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;

use kiln_selftest_guests::{RNG_AND_CONSOLE, VIRTIO_DISCOVERY};
use kiln_vmm::config::{Entry, GuestEnd};
use kiln_vmm::kvm::{DeviceGroup, layout};
use kiln_vmm::virtio::console::Console;
use kiln_vmm::virtio::rng::Rng;

use super::{machine, run};

#[test]
fn devices_are_where_the_command_line_says() {
    let mut machine = machine(1);
    for _ in 0..layout::MAX_DEVICES {
        machine.add_device(Box::new(Rng::new()), DeviceGroup::Streams).unwrap();
    }
    let outcome = run(machine, VIRTIO_DISCOVERY, "", Entry::Auto);
    assert_eq!(outcome.end, GuestEnd::Shutdown);
    let (found, checks): (Vec<_>, Vec<_>) =
        outcome.lines.iter().partition(|line| line.starts_with("device "));
    for (index, device) in found.iter().enumerate() {
        let (base, line) = (layout::window(index), layout::device_irq(index));
        assert_eq!(**device, format!("device base={base:#x} line={line} id=4"));
    }
    assert_eq!(found.len(), layout::MAX_DEVICES);
    let failed: Vec<_> = checks.iter().filter(|line| !line.starts_with("ok ")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    assert_eq!(checks.len() % layout::MAX_DEVICES, 0);
}

#[test]
fn entropy_is_drawn_and_the_console_echoes() {
    let (mut output, guest_output) = std::io::pipe().unwrap();
    let (guest_input, mut input) = std::io::pipe().unwrap();
    let console =
        Console::new(Some(OwnedFd::from(guest_input)), Some(OwnedFd::from(guest_output)), None);
    let mut machine = machine(1);
    machine.add_device(Box::new(console.unwrap()), DeviceGroup::Streams).unwrap();
    machine.add_device(Box::new(Rng::new()), DeviceGroup::Streams).unwrap();
    input.write_all(b"typed by the host\n").unwrap();
    let outcome = run(machine, RNG_AND_CONSOLE, "echo", Entry::Auto);
    assert_eq!(
        outcome.all_ok(),
        ["entropy", "entropy", "entropy differs", "console output", "console input"]
    );
    let mut said = String::new();
    output.read_to_string(&mut said).unwrap();
    assert_eq!(said, "hello from the guest\ntyped by the host\n");
}
