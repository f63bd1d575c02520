//! The guest that drives the network device, with a real tap.

use std::thread;

use kiln_selftest_guests::NET;
use kiln_vmm::config::{Entry, RateConfig};
use kiln_vmm::kvm::DeviceGroup;
use kiln_vmm::virtio::net::{Net, Settings};

use super::tap::{self, EXPERIMENTAL, LENGTHS, Wire};
use super::{machine, run};

#[test]
fn frames_of_all_sizes_go_both_ways() {
    let tap = tap::in_a_new_namespace(1500);
    let wire = Wire::of(EXPERIMENTAL);
    let mac = [2, 0, 0, 0, 0, 7];
    let (receive, transmit) = (RateConfig::default(), RateConfig::default());
    let device = Net::new(tap, Settings { mac, mtu: Some(1500), receive, transmit }).unwrap();
    let mut machine = machine(1);
    machine.add_device(Box::new(device), DeviceGroup::Network).unwrap();
    let host = thread::spawn(move || tap::exchange(&wire));
    let cmdline = format!("net_frames={}", 2 * LENGTHS.len());
    let outcome = run(machine, NET, &cmdline, Entry::Auto);
    assert_eq!(outcome.all_ok(), ["features", "greeting", "echo", "reset"]);
    assert_eq!(host.join().unwrap(), (mac, 1500));
}
