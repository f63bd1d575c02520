//! A guest that sends every device what is malformed, under real KVM: the process that serves it stays
//! within its memory, says little, goes on to the guest's end, and disturbs no other.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use kiln_selftest_guests::HOSTILE;
use kiln_vmm::config::{NetConfig, RateConfig, ShareConfig, VmmEvent, VsockConfig};
use kiln_vmm::virtio::vsock::broker::Broker;

use crate::process::{Vmm, disk_of, inherited};
use crate::share::Share;
use crate::tap::{self, EXPERIMENTAL, Wire};
use crate::witness::{BASE_KIB, Meter, all_ok, honest_neighbour, said_little};

/// What a connection whose reader is behind holds, at most: `docs/limits.md`.
const CONNECTION_KIB: u64 = 256;
/// The host's port, and the guest's.
const PORT: u32 = 1024;
const GUEST_PORT: u32 = 4000;

#[test]
fn every_device_is_attacked() {
    let tap = tap::in_a_new_namespace(1500);
    let wire = Wire::of(EXPERIMENTAL);
    let (share, connection) = Share::start();
    let (_broker, device_end) = Broker::pair().expect("a broker");
    let disk = tempfile::tempfile().expect("a file");
    disk.set_len(16 << 20).expect("sized");
    let mut vmm = Vmm::start_with(HOSTILE.image, 2, |machine| {
        machine.boot.cmdline = format!("memory_mib=64 vsock_port={PORT} race");
        machine.disks.push(disk_of(&disk));
        let socket = inherited(&connection);
        machine.shares.push(ShareConfig { tag: "kiln".into(), socket });
        let (receive, transmit) = (RateConfig::default(), RateConfig::default());
        let (tap, mac) = (inherited(&tap), [2, 0, 0, 0, 0, 9]);
        machine.nets.push(NetConfig { tap, mac, mtu: None, receive, transmit });
        machine.vsock = Some(vsock(&device_end));
    });
    // What is left open here would keep the other ends from seeing the end.
    drop((connection, device_end, tap));
    let meters = [Meter::of(vmm.pid()), Meter::of(share.pid())];
    let (stop, stopped) = mpsc::channel();
    let neighbour = honest_neighbour(stopped);
    let (quiet, until) = mpsc::channel::<()>();
    // Frames for a network device whose receive queue is at fault, until the tap goes with the vmm.
    let sending = thread::spawn(move || {
        while until.try_recv() == Err(mpsc::TryRecvError::Empty)
            && wire.try_send(&tap::frame(60, 1)).is_ok()
        {
            thread::sleep(Duration::from_millis(1));
        }
    });
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    let lines = all_ok(&mut vmm);
    drop((quiet, stop));
    sending.join().expect("sent");
    for id in ["device 1", "device 2", "device 4", "device 5", "device 19", "device 26"] {
        assert!(lines.iter().any(|line| line == id), "no {id}: {lines:#?}");
    }
    assert!(neighbour.join().expect("the honest guest is served") > 0);
    let [most, share_most] = meters.map(Meter::most);
    assert!((1..BASE_KIB).contains(&most), "the vmm had {most} KiB");
    assert!((1..BASE_KIB).contains(&share_most), "the fs process had {share_most} KiB");
    said_little(&vmm.errors());
    said_little(&share.errors());
    share.end();
}

/// A vsock device with one port of the host.
pub fn vsock(broker: &OwnedFd) -> VsockConfig {
    VsockConfig { guest_cid: 3, broker: inherited(broker), host_ports: vec![PORT] }
}

/// More connections than there may be, half of them never answered, and then data for all of which
/// nobody reads a byte.
#[test]
fn connections_that_nobody_reads() {
    const MOST: usize = 256;
    let (broker, device_end) = Broker::pair().expect("a broker");
    let mut vmm = Vmm::start_with(HOSTILE.image, 1, |machine| {
        machine.boot.cmdline = format!("memory_mib=64 vsock_port={PORT} vsock_connections={MOST}");
        machine.vsock = Some(vsock(&device_end));
    });
    drop(device_end);
    let meter = Meter::of(vmm.pid());
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    while vmm.wait_for_line() != "ok listening\n" {}
    let connections: Vec<UnixStream> =
        (0..2 * MOST).map(|_| broker.connect(GUEST_PORT).expect("connected")).collect();
    all_ok(&mut vmm);
    drop(connections);
    let most = meter.most();
    assert!(most < BASE_KIB + MOST as u64 * CONNECTION_KIB, "the vmm had {most} KiB");
    // It is no test if nothing was kept.
    assert!(most > MOST as u64 * CONNECTION_KIB / 2, "the vmm had {most} KiB");
    said_little(&vmm.errors());
}
