//! The guests that drive virtio devices: interrupts by irqfd, doorbells by ioeventfd, each device on
//! its own thread.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::thread;

use kiln_selftest_guests::{BLOCK, FREE_PAGES, HOSTILE, RNG_AND_CONSOLE, VIRTIO_DISCOVERY};
use kiln_vmm::config::{Entry, GuestEnd};
use kiln_vmm::kvm::{DeviceGroup, layout};
use kiln_vmm::virtio::balloon::Balloon;
use kiln_vmm::virtio::block::Block;
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

/// Its driver keeps to no rule, in two processors at once. (`tests/escape` has the other devices attacked
/// so, in the process that serves users.)
#[test]
fn a_console_is_attacked() {
    let (mut output, guest_output) = std::io::pipe().unwrap();
    let (guest_input, mut input) = std::io::pipe().unwrap();
    let console =
        Console::new(Some(OwnedFd::from(guest_input)), Some(OwnedFd::from(guest_output)), None);
    let mut machine = machine(2);
    machine.add_device(Box::new(console.unwrap()), DeviceGroup::Streams).unwrap();
    // There is always something to read, and always somebody who reads; the guest's end ends both.
    let typing = thread::spawn(move || while input.write_all(b"typed by the host\n").is_ok() {});
    let reading = thread::spawn(move || std::io::copy(&mut output, &mut std::io::sink()).unwrap());
    let outcome = run(machine, HOSTILE, "memory_mib=64 race", Entry::Auto);
    assert_eq!(outcome.end, GuestEnd::Shutdown);
    let good = |line: &&String| line.starts_with("ok ") || *line == "device 3";
    assert!(outcome.lines.iter().all(|line| good(&line)), "{outcome:#?}");
    typing.join().unwrap();
    assert!(reading.join().unwrap() > 0);
}

#[test]
fn pages_that_the_guest_reports_are_taken_from_it() {
    let mut machine = machine(1);
    machine.add_device(Box::new(Balloon::new()), DeviceGroup::Storage).unwrap();
    let outcome = run(machine, FREE_PAGES, "", Entry::Auto);
    let pages = std::iter::repeat_n("page", 16);
    let expected: Vec<_> = ["reporting is offered", "nothing is written"]
        .into_iter()
        .chain(pages)
        .chain(["page is used again"])
        .collect();
    assert_eq!(outcome.all_ok(), expected);
}

/// Every 8-byte word holds its own number.
fn numbered_disk(sectors: u64) -> Vec<u8> {
    (0..sectors * 64).flat_map(u64::to_le_bytes).collect()
}

fn file_of(bytes: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn bytes_of(mut file: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn disks_are_read_written_and_flushed() {
    let before = numbered_disk(1024);
    let (writable, read_only) = (file_of(&before), file_of(&before));
    let mut machine = machine(1);
    for (file, is_read_only) in [(&writable, false), (&read_only, true)] {
        let disk = Block::new(file.try_clone().unwrap(), is_read_only, "self-test").unwrap();
        machine.add_device(Box::new(disk), DeviceGroup::Storage).unwrap();
    }
    let outcome = run(machine, BLOCK, "", Entry::Auto);
    let reads = ["read"; 3].into_iter().chain(["read past the end"; 3]);
    let expected: Vec<_> = [
        vec!["capacity"],
        reads.clone().collect(),
        vec!["unknown request", "write and read", "flush feature", "flush"],
        vec!["reads at a time", "reset", "capacity"],
        reads.collect(),
        vec!["unknown request", "write to a read-only disk", "reads at a time", "reset"],
    ]
    .concat();
    assert_eq!(outcome.all_ok(), expected);

    let mut after = before.clone();
    let half = before.len() / 2;
    after[half..half + 64 * 512].iter_mut().for_each(|byte| *byte = !*byte);
    assert!(bytes_of(writable) == after, "the guest's writes are not all there");
    assert!(bytes_of(read_only) == before, "the read-only disk has changed");
}
