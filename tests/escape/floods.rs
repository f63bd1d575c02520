//! A guest that has the host do the same thing as often as it can, for ever: interrupts, notifications
//! and console output. What it costs is the guest's own time.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::process::{ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use kiln_selftest_guests::{BABBLE, Guest, STORM};
use kiln_vmm::config::{ConsoleKind, MachineConfig, NetConfig, RateConfig, ShareConfig, VmmEvent};
use kiln_vmm::virtio::vsock::broker::Broker;
use serde_json::json;

use crate::devices::vsock;
use crate::process::{Vmm, disk_of, inherited};
use crate::share::Share;
use crate::stage::{Stage, errors};
use crate::tap;
use crate::witness::{BASE_KIB, Meter, all_ok, honest_neighbour, said_little};

/// How long a machine's end may take on a loaded host: no deadline of kiln's is as short.
const PATIENCE: Duration = Duration::from_secs(30);

/// How long a flood lasts that does not end by itself.
const FLOOD: Duration = Duration::from_secs(1);

/// All that a vmm says whose monitor has gone.
const STOPPED: &str = "kiln: stopped before the guest ended\n";

/// Lets go of the vmm as a monitor does that dies; it must end. How it did.
fn let_go(vmm: &mut Vmm) -> ExitStatus {
    let begin = Instant::now();
    let (ours, _) = std::io::pipe().expect("a pipe");
    vmm.control = ours.into();
    let status = vmm.wait();
    assert!(begin.elapsed() < PATIENCE, "it took {:?}", begin.elapsed());
    status
}

/// A machine in which everything interrupts.
fn storm(cpus: u8, words: &str, change: impl FnOnce(&mut MachineConfig)) -> Vmm {
    let disk = tempfile::tempfile().expect("a file");
    disk.set_len(1 << 20).expect("sized");
    Vmm::start_with(STORM.image, cpus, |machine| {
        machine.boot.cmdline = format!("memory_mib=64 cpus={cpus} {words}");
        machine.disks.push(disk_of(&disk));
        change(machine);
    })
}

#[test]
fn a_storm_of_interrupts_passes() {
    let tap = tap::in_a_new_namespace(1500);
    let (share, connection) = Share::start();
    let (_broker, device_end) = Broker::pair().expect("a broker");
    let mut vmm = storm(3, "", |machine| {
        let socket = inherited(&connection);
        machine.shares.push(ShareConfig { tag: "kiln".into(), socket });
        let (receive, transmit) = (RateConfig::default(), RateConfig::default());
        let (tap, mac) = (inherited(&tap), [2, 0, 0, 0, 0, 10]);
        machine.nets.push(NetConfig { tap, mac, mtu: None, receive, transmit });
        machine.vsock = Some(vsock(&device_end));
    });
    drop((connection, device_end, tap));
    let meters = [Meter::of(vmm.pid()), Meter::of(share.pid())];
    let (stop, stopped) = mpsc::channel();
    let neighbour = honest_neighbour(stopped);
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    let lines = all_ok(&mut vmm);
    drop(stop);
    for id in ["device 1", "device 2", "device 4", "device 5", "device 19", "device 26"] {
        assert!(lines.iter().any(|line| line == id), "no {id}: {lines:#?}");
    }
    assert!(neighbour.join().expect("the honest guest is served") > 0);
    for most in meters.map(Meter::most) {
        assert!((1..BASE_KIB).contains(&most), "a process had {most} KiB");
    }
    said_little(&vmm.errors());
    said_little(&share.errors());
    share.end();
}

#[test]
fn a_storm_that_does_not_end_is_ended() {
    let mut vmm = storm(3, "endless", |_| ());
    let meter = Meter::of(vmm.pid());
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    while vmm.wait_for_line() != "ok storming\n" {}
    thread::sleep(FLOOD);
    let_go(&mut vmm);
    let most = meter.most();
    assert!((1..BASE_KIB).contains(&most), "the vmm had {most} KiB");
    said_little(&vmm.errors());
}

/// A guest that never stops talking, on either kind of console.
fn babble(kind: ConsoleKind) -> Vmm {
    let Guest { image, .. } = BABBLE;
    let vmm = Vmm::start_with(image, 1, |machine| machine.console.kind = kind);
    assert_eq!(vmm.event(), Some(VmmEvent::Running));
    vmm
}

/// Nobody reads: the guest waits, and nothing is kept but what is bounded.
#[test]
fn a_console_that_nobody_reads_stops_the_guest() {
    for kind in [ConsoleKind::Serial, ConsoleKind::Virtio] {
        let mut vmm = babble(kind);
        let meter = Meter::of(vmm.pid());
        thread::sleep(FLOOD);
        let_go(&mut vmm);
        let most = meter.most();
        assert!((1..BASE_KIB).contains(&most), "{kind:?}: the vmm had {most} KiB");
        assert_eq!(vmm.errors(), STOPPED, "{kind:?}");
    }
}

/// All is read: as much as comes in the time, and beside it an honest guest goes on.
#[test]
fn a_console_that_never_falls_silent_disturbs_nobody() {
    for kind in [ConsoleKind::Serial, ConsoleKind::Virtio] {
        let mut vmm = babble(kind);
        let meter = Meter::of(vmm.pid());
        let (stop, stopped) = mpsc::channel();
        let neighbour = honest_neighbour(stopped);
        let begin = Instant::now();
        let mut read = 0;
        let mut buffer = [0; 4096];
        while begin.elapsed() < FLOOD || read < 4 << 10 {
            read += vmm.output().read(&mut buffer).expect("read");
        }
        drop(stop);
        assert!(neighbour.join().expect("the honest guest is served") > 0);
        let_go(&mut vmm);
        let most = meter.most();
        assert!((1..BASE_KIB).contains(&most), "{kind:?}: the vmm had {most} KiB");
        assert_eq!(vmm.errors(), STOPPED, "{kind:?}");
    }
}

/// A debug log has all that a guest's console says, until that is more than explains anything.
#[test]
fn a_guest_does_not_fill_the_log_with_its_console() {
    const LINES: usize = 30_000;
    let script = format!(
        "
        busybox mknod /tmp/console c 4 64 && yes x | head -n {LINES} > /tmp/console; exit 5"
    );
    let stage = Stage::new(&["busybox", "sh", "-c", &script]);
    stage.edit(|config| {
        let sets = ["bounding", "effective", "permitted"].map(|set| (set, json!(["CAP_MKNOD"])));
        config["process"]["capabilities"] = json!(BTreeMap::from(sets));
        let device = json!({"allow": true, "type": "c", "major": 4, "minor": 64, "access": "rwm"});
        config["linux"]["resources"] = json!({"devices": [device]});
    });
    let log = stage.path().join("log");
    let mut command = stage.kiln();
    command.args(["--debug", "--log"]).arg(&log);
    command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    let output = command.stdin(Stdio::null()).output().expect("kiln runs");
    assert_eq!(output.status.code(), Some(5), "{}", errors(&output));
    let log = fs::read_to_string(log).expect("a log");
    assert!(log.contains("writes more than is logged"), "{} lines", log.lines().count());
    let copied = log.lines().filter(|line| line.contains("role=\"console\"")).count();
    assert!(copied < LINES, "{copied} lines");
}
