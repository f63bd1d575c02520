//! Network namespaces of the tests' own, prepared as callers prepare them.

use std::io::{ErrorKind, Read};
use std::net::IpAddr;
use std::process::Command;
use std::sync::mpsc;

use kiln_protocol::network::{InterfaceAddress, Neighbour, Route, RouteKind};
use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs a command in the calling thread's namespaces; gives what it writes.
fn run(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().expect("a program")).args(words).output();
    let output = output.expect("these tests need iproute2");
    assert!(output.status.success(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A thread in a network namespace of its own that runs commands, as what is outside of a sandbox.
struct Outside {
    commands: mpsc::Sender<(String, mpsc::Sender<bool>)>,
    thread: libc::pid_t,
}

impl Outside {
    fn new() -> Self {
        let (commands, queue) = mpsc::channel::<(String, mpsc::Sender<bool>)>();
        let (started, thread) = mpsc::channel();
        std::thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
            started.send(nix::unistd::gettid().as_raw()).expect("the test waits");
            for (line, done) in queue {
                let mut words = line.split(' ');
                let program = words.next().expect("a program");
                let output = Command::new(program).args(words).output().expect("runs");
                let _ = done.send(output.status.success());
            }
        });
        Self { commands, thread: thread.recv().expect("the thread starts") }
    }

    /// Begins to run a command: whether it succeeded comes later.
    fn begin(&self, line: &str) -> mpsc::Receiver<bool> {
        let (done, result) = mpsc::channel();
        self.commands.send((line.to_owned(), done)).expect("the thread runs");
        result
    }

    fn run(&self, line: &str) {
        assert!(self.begin(line).recv().expect("runs"), "{line}");
    }
}

/// The calling thread's namespace becomes that of a sandbox.
fn namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    run("ip link set lo up");
}

/// An interface as most callers make it, whose other end is outside.
fn add_interface(name: &str, outside: &Outside) {
    let address = if name == "eth0" { "0a:58:0a:01:01:05" } else { "0a:58:0a:01:02:05" };
    run(&format!("ip link add {name} address {address} type veth peer name out-{name}"));
    run(&format!("ip link set out-{name} netns {}", outside.thread));
    outside.run(&format!("ip link set out-{name} up"));
}

fn configure() {
    for line in [
        "ip link set eth0 mtu 1400 up",
        "ip addr add 10.1.1.5/24 brd 10.1.1.255 dev eth0",
        "ip addr add fd00:1::5/64 dev eth0 nodad",
        "ip neigh add 10.1.1.9 lladdr 02:00:00:00:00:09 dev eth0 nud permanent",
        // As the ptp plugin of CNI does.
        "ip route del 10.1.1.0/24",
        "ip route add 10.1.1.1 dev eth0 scope link src 10.1.1.5",
        "ip route add 10.1.1.0/24 via 10.1.1.1 src 10.1.1.5",
        "ip route add default via 10.1.1.1 metric 50 mtu 1300 advmss 1200 proto static",
        "ip route add 192.0.2.128/25 via 192.0.2.1 dev eth0 onlink",
        "ip route add 10.6.0.0/16 via inet6 fd00:1::1 dev eth0",
        "ip route add blackhole 10.9.0.0/16",
        "ip route add unreachable fd00:9::/32",
        "ip route add default via fd00:1::1",
        "ip route add 10.8.0.0/16 via 10.1.1.1 table 7",
    ] {
        run(line);
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn route(to: &str, prefix: u8) -> Route {
    Route {
        kind: RouteKind::Unicast,
        destination: ip(to),
        prefix,
        interface: Some(0),
        gateway: None,
        on_link: false,
        source: None,
        metric: None,
        type_of_service: 0,
        scope: 0,
        protocol: 3,
        mtu: None,
        advertised_mss: None,
    }
}

#[test]
fn the_guest_is_told_what_the_caller_prepared() {
    namespace();
    let outside = Outside::new();
    add_interface("eth0", &outside);
    configure();
    let (mut uplinks, devices) = Uplinks::prepare(1).expect("prepared");
    assert_eq!(devices.len(), 1);
    let network = uplinks.join().expect("joined");
    let [eth0] = &network.interfaces[..] else { panic!("{network:?}") };
    assert_eq!((eth0.name.as_str(), eth0.mtu, eth0.up), ("eth0", 1400, true));
    assert_eq!(eth0.device, devices[0].address);
    assert_eq!(eth0.link_address, [0x0a, 0x58, 0x0a, 1, 1, 5]);
    let address = |address: &str, prefix, scope| InterfaceAddress {
        address: ip(address),
        prefix,
        peer: None,
        broadcast: ip(address).is_ipv4().then(|| "10.1.1.255".parse().expect("an address")),
        scope,
        valid: u32::MAX,
        preferred: u32::MAX,
    };
    let mut addresses = eth0.addresses.clone();
    addresses.sort_by_key(|address| address.address);
    assert_eq!(
        addresses,
        [
            address("10.1.1.5", 24, 0),
            address("fd00:1::5", 64, 0),
            address("fe80::858:aff:fe01:105", 64, 253),
        ]
    );
    let neighbour = Neighbour { address: ip("10.1.1.9"), link_address: [2, 0, 0, 0, 0, 9] };
    assert_eq!(eth0.neighbours, [neighbour]);
    let on_link = Route { scope: 253, source: Some(ip("10.1.1.5")), ..route("10.1.1.1", 32) };
    let gateway = Some(ip("10.1.1.1"));
    for expected in [
        on_link,
        Route { gateway, source: on_link.source, ..route("10.1.1.0", 24) },
        Route {
            gateway,
            metric: Some(50),
            mtu: Some(1300),
            advertised_mss: Some(1200),
            protocol: 4,
            ..route("0.0.0.0", 0)
        },
        Route { gateway: Some(ip("192.0.2.1")), on_link: true, ..route("192.0.2.128", 25) },
        Route { gateway: Some(ip("fd00:1::1")), ..route("10.6.0.0", 16) },
        Route { kind: RouteKind::Blackhole, interface: None, ..route("10.9.0.0", 16) },
        Route { gateway: Some(ip("fd00:1::1")), metric: Some(1024), ..route("::", 0) },
        Route { metric: Some(256), protocol: 2, ..route("fe80::", 64) },
    ] {
        assert!(network.routes.contains(&expected), "{expected:?}: {:?}", network.routes);
    }
    let place = |wanted: &Route| network.routes.iter().position(|route| route == wanted);
    assert!(network.routes[place(&on_link).expect("there")..].iter().any(|r| r.gateway.is_some()));
    let has_gateway = network.routes.iter().map(|route| route.gateway.is_some());
    assert!(has_gateway.is_sorted(), "{:#?}", network.routes);
    assert!(!network.routes.iter().any(|route| route.destination == ip("10.8.0.0")));
}

#[test]
fn frames_go_to_the_tap_and_the_hosts_stack_says_nothing() {
    namespace();
    let outside = Outside::new();
    add_interface("eth0", &outside);
    let (mut uplinks, devices) = Uplinks::prepare(1).expect("prepared");
    // As by callers that make the interface after the container.
    configure();
    outside.run("ip addr add 10.1.1.1/24 dev out-eth0");
    outside.run("/bin/busybox ping -c 1 -W 20 10.1.1.5");
    uplinks.join().expect("joined");
    outside.run("ip neigh flush all");
    let answered = outside.begin("/bin/busybox arping -c 2 -w 2 -I out-eth0 10.1.1.5");
    let asked = wait_for_frame(&devices[0].tap, &[10, 1, 1, 5]);
    assert!(asked, "the question does not reach the tap");
    assert!(!answered.recv().expect("runs"), "the host's stack has answered");
}

/// Waits for a frame that contains some bytes.
fn wait_for_frame(tap: &OwnedFd, wanted: &[u8]) -> bool {
    let mut tap = std::fs::File::from(tap.try_clone().expect("descriptors"));
    let mut frame = [0; 2048];
    (0..100).any(|_| match tap.read(&mut frame) {
        Ok(length) => frame[..length].windows(wanted.len()).any(|bytes| bytes == wanted),
        Err(error) => panic!("{:?} {error}", error.kind() == ErrorKind::WouldBlock),
    })
}

#[test]
fn interfaces_that_come_after_the_devices_are_joined_or_named() {
    namespace();
    let outside = Outside::new();
    let (mut uplinks, devices) = Uplinks::prepare(1).expect("prepared");
    assert_eq!(devices.len(), 1);
    assert_eq!(uplinks.join().expect("nothing to join").interfaces, []);
    add_interface("eth0", &outside);
    run("ip link set eth0 up");
    add_interface("eth1", &outside);
    assert_eq!(uplinks.join().expect("joined").interfaces[0].name, "eth0");
    run("ip link set eth1 up");
    let error = uplinks.join().expect_err("one device").to_string();
    assert!(error.starts_with("network interface eth1: "), "{error}");
    assert!(Uplinks::prepare(0).expect("prepared").1.len() == 2);
}

#[test]
fn nothing_is_left_and_what_was_there_stays() {
    namespace();
    let outside = Outside::new();
    for name in ["eth0", "eth1"] {
        add_interface(name, &outside);
        run(&format!("ip link set {name} up"));
    }
    run("tc qdisc add dev eth1 ingress");
    run("tc filter add dev eth1 parent ffff: protocol ip prio 9 u32 match u32 0 0 flowid 1:1");
    let before = ["eth0", "eth1"].map(disciplines);
    let (mut uplinks, devices) = Uplinks::prepare(0).expect("prepared");
    uplinks.join().expect("joined");
    assert_ne!(["eth0", "eth1"].map(disciplines), before);
    drop(devices);
    uplinks.leave();
    assert_eq!(["eth0", "eth1"].map(disciplines), before);
    assert!(!run("ip link").contains("kiln"), "{}", run("ip link"));
}

fn disciplines(interface: &str) -> String {
    let filters = run(&format!("tc filter show dev {interface} ingress"));
    // What the kernel names as a filter's parent depends on who was there last.
    run(&format!("tc qdisc show dev {interface}")) + &filters.replace("parent ffff: ", "")
}

#[test]
fn an_interface_belongs_to_one_sandbox_as_long_as_that_lives() {
    namespace();
    let outside = Outside::new();
    add_interface("eth0", &outside);
    run("ip link set eth0 up");
    let (mut first, its_devices) = Uplinks::prepare(1).expect("prepared");
    first.join().expect("joined");
    let (mut second, _devices) = Uplinks::prepare(1).expect("prepared");
    let error = second.join().expect_err("taken").to_string();
    assert!(error.contains("eth0: is another sandbox's"), "{error}");
    second.leave();
    assert!(disciplines("eth0").contains("mirred"), "{}", disciplines("eth0"));
    // As if its processes were killed.
    drop(its_devices);
    second.join().expect("free again");
}

#[test]
fn what_a_guest_can_not_have_is_refused_by_name() {
    let cases: [(&[&str], &str); 4] = [
        (&["ip tuntap add tun7 mode tun", "ip link set tun7 up"], "network interface tun7: is not"),
        (
            &["ip link add link eth0 name macvlan3 type macvlan", "ip link set macvlan3 up"],
            "network interface macvlan3: lies on eth0",
        ),
        (
            &["ip route add 10.3.0.0/16 nexthop via 10.1.1.1 nexthop dev eth0"],
            "route to 10.3.0.0/16: has several next hops",
        ),
        (&["ip route add 10.4.0.0/16 dev lo"], "route to 10.4.0.0/16: leads over an interface"),
    ];
    for (lines, expected) in cases {
        namespace();
        let outside = Outside::new();
        add_interface("eth0", &outside);
        configure();
        lines.iter().for_each(|line| drop(run(line)));
        let tried = Uplinks::prepare(1).and_then(|(mut uplinks, _devices)| uplinks.join());
        let error = tried.expect_err(expected).to_string();
        assert!(error.starts_with(expected), "{error}");
    }
}

#[test]
fn more_than_a_guest_takes_is_refused() {
    namespace();
    for number in 0..=MAX_INTERFACES / 2 {
        run(&format!("ip link add a{number} type veth peer name b{number}"));
        run(&format!("ip link set a{number} up"));
    }
    run("ip link set b0 up");
    let error = Uplinks::prepare(0).expect_err("both ends of a pair").to_string();
    assert!(error.contains("lies on"), "{error}");
}
