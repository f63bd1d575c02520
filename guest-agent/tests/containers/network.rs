//! Interfaces that a container gets when it is started: one end of a veth pair stands for the guest's
//! network device, the other for what is behind it on the host.

use std::process::Command;

use kiln_protocol::network::{Interface, InterfaceAddress, Neighbour, Network, Route, RouteKind};
use kiln_protocol::{FailurePhase, FromAgent, Stdio};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::guest::{Guest, shell};

const DEVICE: [u8; 6] = [2, 0, 0, 0, 0, 1];
const ADDRESS: [u8; 6] = [0x0a, 0x58, 0x0a, 1, 1, 5];

/// Runs `ip` in the calling thread's namespaces.
fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split(' ')).status();
    assert!(status.expect("these tests need iproute2").success(), "ip {arguments}");
}

/// An agent in a network namespace of its own with the devices `dev0` and `dev1`, whose other ends
/// are `peer0` and `peer1`.
fn guest_with_devices() -> Guest {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    for number in 0..2 {
        let device = format!("dev{number} address 02:00:00:00:00:0{}", number + 1);
        ip(&format!("link add {device} type veth peer name peer{number}"));
    }
    Guest::start()
}

fn on_interface(address: &str, prefix: u8) -> InterfaceAddress {
    InterfaceAddress {
        address: address.parse().expect("an address"),
        prefix,
        peer: None,
        broadcast: None,
        scope: 0,
        valid: u32::MAX,
        preferred: u32::MAX,
    }
}

fn interface() -> Interface {
    Interface {
        device: DEVICE,
        name: "eth0".to_owned(),
        link_address: ADDRESS,
        mtu: 1400,
        up: true,
        addresses: vec![
            InterfaceAddress {
                broadcast: Some("10.1.1.255".parse().expect("an address")),
                ..on_interface("10.1.1.5", 24)
            },
            on_interface("fd00:1::5", 64),
            InterfaceAddress { scope: 253, ..on_interface("fe80::5", 64) },
        ],
        neighbours: vec![Neighbour {
            address: "10.1.1.9".parse().expect("an address"),
            link_address: [2, 0, 0, 0, 0, 9],
        }],
    }
}

/// A route on the link of the first interface.
fn route(destination: &str, prefix: u8) -> Route {
    let destination = destination.parse().expect("an address");
    Route {
        kind: RouteKind::Unicast,
        destination,
        prefix,
        interface: Some(0),
        gateway: None,
        on_link: false,
        source: None,
        metric: None,
        type_of_service: 0,
        scope: if destination.is_ipv4() { 253 } else { 0 },
        protocol: 4,
        mtu: None,
        advertised_mss: None,
    }
}

fn by(gateway: &str, destination: &str, prefix: u8) -> Route {
    let gateway = Some(gateway.parse().expect("an address"));
    Route { gateway, scope: 0, ..route(destination, prefix) }
}

/// As the ptp plugin of CNI leaves it: the prefix itself goes by the gateway.
fn routes() -> Vec<Route> {
    let source = Some("10.1.1.5".parse().expect("an address"));
    vec![
        Route { source, ..route("10.1.1.1", 32) },
        route("fd00:1::", 64),
        Route { source, ..by("10.1.1.1", "10.1.1.0", 24) },
        Route { metric: Some(50), mtu: Some(1300), ..by("10.1.1.1", "0.0.0.0", 0) },
        Route { on_link: true, ..by("192.0.2.1", "192.0.2.128", 25) },
        by("fd00:1::1", "::", 0),
        by("fd00:1::1", "10.6.0.0", 16),
        Route { kind: RouteKind::Blackhole, interface: None, scope: 0, ..route("10.9.0.0", 16) },
    ]
}

fn network() -> Option<Box<Network>> {
    Some(Box::new(Network { interfaces: vec![interface()], routes: routes() }))
}

#[test]
fn the_container_has_what_was_described_and_nothing_else() {
    let mut guest = guest_with_devices();
    guest.network = network();
    let outcome = guest.run(&shell(
        "for what in link addr route '-6 route' 'neigh show nud permanent'; do ip -o $what; done",
    ));
    let lines: Vec<_> = outcome.stdout.lines().map(str::trim).collect();
    for expected in [
        "eth0 mtu 1400 0a:58:0a:01:01:05",
        "eth0 inet 10.1.1.5/24 10.1.1.255",
        "eth0 inet6 fd00:1::5/64 global",
        "eth0 inet6 fe80::5/64 link",
        "10.1.1.1 dev eth0 scope link src 10.1.1.5",
        "10.1.1.0/24 via 10.1.1.1",
        "default via 10.1.1.1 metric 50",
        "192.0.2.128/25 via 192.0.2.1 onlink",
        "default via fd00:1::1",
        "blackhole 10.9.0.0/16",
        "10.1.1.9 lladdr 02:00:00:00:00:09",
    ] {
        let found = lines.iter().any(|line| expected.split(' ').all(|word| line.contains(word)));
        assert!(found, "{expected}:\n{}", outcome.stdout);
    }
    let addresses = lines.iter().filter(|line| line.contains(" eth0 ") && line.contains("inet"));
    assert_eq!(addresses.count(), 3, "{}", outcome.stdout);
    for absent in ["dev0", "dev1", "fe80::858", "10.1.1.0/24 dev"] {
        assert!(!outcome.stdout.contains(absent), "{absent}:\n{}", outcome.stdout);
    }
}

#[test]
fn neighbours_reach_the_container() {
    let mut guest = guest_with_devices();
    ip("addr add 10.1.1.1/24 dev peer0");
    ip("addr add fd00:1::1/64 dev peer0 nodad");
    ip("link set peer0 up");
    guest.network = network();
    let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
    guest.create(&shell("sleep 1000"), Vec::new(), stdio);
    guest.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
    guest.start_container();
    guest.expect(|message| matches!(message, FromAgent::Started { .. })).expect("started");
    for address in ["10.1.1.5", "fd00:1::5"] {
        let ping = ["ping", "-c", "1", "-W", "20", address];
        let answered = Command::new("/bin/busybox").args(ping).output().expect("busybox");
        assert!(answered.status.success(), "{address}: {answered:?}");
    }
}

#[test]
fn ipv6_that_the_container_switched_off_stays_off() {
    let mut guest = guest_with_devices();
    guest.network = network();
    let mut config = shell("ip -o addr show dev eth0; ip -6 route");
    config["linux"]["sysctl"] = json!({
        "net.ipv6.conf.all.disable_ipv6": "1", "net.ipv6.conf.default.disable_ipv6": "1",
    });
    let outcome = guest.run(&config);
    assert!(outcome.stdout.contains("10.1.1.5/24"), "{outcome:?}");
    assert!(!outcome.stdout.contains("fd00"), "{outcome:?}");
}

#[test]
fn what_can_not_be_set_up_is_named_and_the_program_is_not_executed() {
    type Spoil = fn(&mut Network);
    let cases: [(Spoil, &str); 5] = [
        (|n| n.interfaces[0].device = [2, 9, 9, 9, 9, 9], "eth0: no device has the address 02:09:"),
        (|n| n.interfaces[0].mtu = u32::MAX, "network interface eth0: MTU"),
        (|n| n.interfaces[0].name = "lo".to_owned(), "network interface lo: name"),
        (|n| n.routes[3].gateway = "10.7.7.7".parse().ok(), "route to 0.0.0.0/0"),
        (|n| n.routes[0].interface = Some(1), "route to 10.1.1.1/32"),
    ];
    for (spoil, expected) in cases {
        let mut guest = guest_with_devices();
        let mut spoilt = network().expect("a network");
        spoil(&mut spoilt);
        guest.network = Some(spoilt);
        let refusal = guest.fail(&shell("touch /tmp/executed"));
        assert_eq!(refusal.phase, FailurePhase::Network, "{refusal:?}");
        assert!(refusal.message.contains(expected), "{refusal:?}");
        assert!(!guest.rootfs().join("tmp/executed").exists(), "{expected}");
    }
}

#[test]
fn a_container_without_a_network_namespace_gets_no_interfaces() {
    let mut guest = guest_with_devices();
    guest.network = network();
    let mut config = shell("true");
    config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "uts"}, {"type": "mount"}]);
    let refusal = guest.fail(&config);
    assert!(refusal.message.contains("linux.namespaces"), "{refusal:?}");
}
