//! The guest that drives the vsock device, with a host that reads late.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;

use kiln_selftest_guests::VSOCK;
use kiln_vmm::config::Entry;
use kiln_vmm::kvm::{DeviceGroup, Machine};
use kiln_vmm::virtio::vsock::Vsock;
use kiln_vmm::virtio::vsock::broker::Broker;

use super::{machine, run, run_and_watch};

const CID: u64 = 3;
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 1025;

fn machine_with_vsock() -> (Machine, Broker) {
    let (broker, device_end) = Broker::pair().unwrap();
    let mut machine = machine(1);
    let device = Vsock::new(CID, &[PORT], device_end).unwrap();
    machine.add_device(Box::new(device), DeviceGroup::Streams).unwrap();
    (machine, broker)
}

/// Sends back what comes, little by little, until the other side closes.
fn echo(mut stream: UnixStream) {
    stream.set_nonblocking(false).unwrap();
    let mut chunk = [0; 1500];
    loop {
        match stream.read(&mut chunk).unwrap() {
            0 => return,
            count => stream.write_all(&chunk[..count]).unwrap(),
        }
    }
}

#[test]
fn bytes_come_back_whole_under_credit_pressure() {
    // More than the device and the socket behind it hold.
    const BYTES: usize = 768 << 10;

    let (machine, broker) = machine_with_vsock();
    let (ran_out, wait) = mpsc::channel();
    let host = thread::spawn(move || {
        let (port, stream) = broker.accept().unwrap().unwrap();
        // Or until the guest has ended.
        let _ = wait.recv();
        echo(stream);
        port
    });
    let cmdline = format!("vsock_refused=999 vsock_port={PORT} vsock_bytes={BYTES}");
    let outcome = run_and_watch(machine, VSOCK, &cmdline, Entry::Auto, move |line| {
        if line == "ok host's credit ran out" {
            ran_out.send(()).unwrap();
        }
    });
    assert_eq!(
        outcome.all_ok(),
        ["refused connection", "connection to the host", "host's credit ran out", "echo", "close"]
    );
    assert_eq!(host.join().unwrap(), PORT);
}

#[test]
fn the_host_connects_and_waits_for_the_guests_credit() {
    const BYTES: usize = 128 << 10;

    let (machine, broker) = machine_with_vsock();
    let host = thread::spawn(move || {
        let mut stream = broker.connect(GUEST_PORT).unwrap();
        let sent: Vec<u8> = (0..BYTES).map(|index| (index * 7 + index / 251) as u8).collect();
        let mut writer = stream.try_clone().unwrap();
        let to_send = sent.clone();
        let writing = thread::spawn(move || writer.write_all(&to_send).unwrap());
        let mut received = vec![0; BYTES];
        stream.read_exact(&mut received).unwrap();
        writing.join().unwrap();
        received == sent
    });
    let outcome = run(machine, VSOCK, &format!("vsock_listen={GUEST_PORT}"), Entry::Auto);
    assert_eq!(outcome.all_ok(), ["listening", "echo to the host"]);
    assert!(host.join().unwrap(), "what came back is not what was sent");
}
