//! A sandbox on a network, as its caller prepares it: a namespace with one end of a veth pair, whose
//! other end is the test's.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream, UdpSocket};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::lifecycle::{create, kiln, succeeds, wait_for, wait_for_output};
use crate::run::eventually;
use crate::stage::{Stage, config, errors};

/// Runs a command in the calling thread's namespaces; gives what it prints.
fn command(line: &str) -> String {
    let mut words = line.split(' ');
    let output = Command::new(words.next().expect("a program")).args(words).output();
    let output = output.expect("these tests need iproute2");
    assert!(output.status.success(), "{line}: {}", errors(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The calling thread is in a network namespace of its own from here on: the outside of sandboxes.
fn outside() {
    unshare(CloneFlags::CLONE_NEWNET).expect("these tests need root");
    command("ip link set lo up");
}

/// A network namespace that is there as long as this.
struct Namespace(Child);

impl Namespace {
    fn new() -> Self {
        let link = |pid: String| std::fs::read_link(format!("/proc/{pid}/ns/net")).expect("proc");
        let own = link("thread-self".to_owned());
        let child = Command::new("unshare").args(["--net", "sleep", "1000"]).spawn();
        let namespace = Self(child.expect("unshare"));
        eventually("a new namespace", || link(namespace.0.id().to_string()) != own);
        namespace
    }

    fn pid(&self) -> String {
        self.0.id().to_string()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs a command in the network namespace of a process.
fn inside(pid: &str, line: &str) -> String {
    command(&format!("nsenter --net --target {pid} {line}"))
}

/// Gives the namespace of a process the interface `eth<number>`, whose network is 10.1.<number>.0/24
/// and fd00:<number>::/64: outside is 1 there, inside is 5.
fn add_interface(pid: &str, number: u8) {
    let (out, name) = (format!("out{number}"), format!("eth{number}"));
    command(&format!("ip link add {out} mtu 1400 type veth peer name {name} mtu 1400"));
    command(&format!("ip link set {name} netns {pid}"));
    command(&format!("ip addr add 10.1.{number}.1/24 dev {out}"));
    command(&format!("ip addr add fd00:{number}::1/64 dev {out} nodad"));
    command(&format!("ip link set {out} up"));
    inside(pid, &format!("ip addr add 10.1.{number}.5/24 dev {name}"));
    inside(pid, &format!("ip addr add fd00:{number}::5/64 dev {name} nodad"));
    inside(pid, &format!("ip link set {name} up"));
}

/// A bundle that runs a script, with a network namespace.
fn stage(script: &str, path: Option<&str>) -> Stage {
    let stage = Stage::new(&[]);
    let mut config = config(&["sh", "-c", script]);
    let capabilities = ["CAP_NET_RAW"];
    config["process"]["capabilities"] =
        json!({"bounding": capabilities, "effective": capabilities, "permitted": capabilities});
    let mut network = json!({"type": "network"});
    if let Some(path) = path {
        network["path"] = json!(path);
    }
    config["linux"]["namespaces"] = json!([{"type": "pid"}, {"type": "mount"}, network]);
    stage.write_config(&config);
    stage
}

fn path_of(namespace: &Namespace) -> String {
    format!("/proc/{}/ns/net", namespace.pid())
}

fn pings(address: &str) -> bool {
    let ping = ["ping", "-c", "1", "-W", "30", address];
    Command::new("/bin/busybox").args(ping).output().expect("busybox").status.success()
}

fn output(stage: &Stage) -> String {
    std::fs::read_to_string(stage.path().join("output")).expect("output")
}

#[test]
fn guest_stands_where_the_callers_interface_is() {
    outside();
    let namespace = Namespace::new();
    let pid = namespace.pid();
    add_interface(&pid, 0);
    inside(&pid, "ip route add default via 10.1.0.1");
    inside(&pid, "ip route add default via fd00:0::1");
    let host = inside(&pid, "ip -o link show dev eth0");
    let script = "
        busybox ip -o addr; busybox ip -o link; busybox ip route; busybox ip -6 route
        busybox ping -c 1 -W 30 10.1.0.1 && echo ping 4
        busybox ping -c 1 -W 30 fd00:0::1 && echo ping 6
        busybox nslookup kiln.test 10.1.0.1
        head -c 3000000 /dev/zero | busybox nc 10.1.0.1 6000
        busybox nc -ll -p 5000 -e cat";
    let stage = stage(script, Some(&path_of(&namespace)));
    let resolver = UdpSocket::bind("10.1.0.1:53").expect("UDP");
    let listener = TcpListener::bind("10.1.0.1:6000").expect("TCP");
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);

    assert!(pings("10.1.0.5") && pings("fd00:0::5"));
    resolve(&resolver);
    let mut received = Vec::new();
    listener.accept().expect("the guest connects").0.read_to_end(&mut received).expect("reads");
    assert_eq!(received.len(), 3_000_000);
    let mut echo = None;
    eventually("the guest listens", || {
        echo = TcpStream::connect("10.1.0.5:5000").ok();
        echo.is_some()
    });
    let mut echo = echo.expect("a connection");
    let sent: Vec<u8> = (0..1_000_000u32).map(|number| (number % 251) as u8).collect();
    std::thread::scope(|scope| {
        let mut writer = echo.try_clone().expect("descriptors");
        let sent = &sent;
        scope.spawn(move || {
            writer.write_all(sent).expect("writes");
            writer.shutdown(Shutdown::Write).expect("ends");
        });
        received.clear();
        echo.read_to_end(&mut received).expect("reads");
    });
    assert!(received == sent, "{} bytes of {}", received.len(), sent.len());

    let text = output(&stage);
    let address = host.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
    for expected in [
        address.expect("an address"),
        "mtu 1400",
        "10.1.0.5/24",
        "fd00::5/64",
        "default via 10.1.0.1",
        "default via fd00::1",
        "ping 4",
        "ping 6",
        "192.0.2.77",
    ] {
        assert!(text.contains(expected), "{expected}:\n{text}");
    }
    assert!(inside(&pid, "tc qdisc show dev eth0").contains("ingress"));
    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    eventually("no tap", || !inside(&pid, "ip link").contains("kiln"));
    assert!(!inside(&pid, "tc qdisc show dev eth0").contains("ingress"));
}

/// Answers the question for an IPv4 address with 192.0.2.77, and any other with nothing.
fn resolve(socket: &UdpSocket) {
    socket.set_read_timeout(Some(Duration::from_secs(60))).expect("a time-out");
    let mut question = [0; 512];
    loop {
        let (length, from) = socket.recv_from(&mut question).expect("the guest asks");
        let question = &question[..length];
        let is_ipv4 = question.ends_with(&[0, 1, 0, 1]);
        let mut answer = question.to_vec();
        answer[2..8].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_ipv4)]);
        if is_ipv4 {
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 77]);
        }
        socket.send_to(&answer, from).expect("answers");
        if is_ipv4 {
            return;
        }
    }
}

#[test]
fn what_a_killed_monitor_left_on_interfaces_goes_with_the_container() {
    outside();
    let namespace = Namespace::new();
    let pid = namespace.pid();
    add_interface(&pid, 0);
    add_interface(&pid, 1);
    // The second is somebody else's too.
    inside(&pid, "tc qdisc add dev eth1 ingress");
    let other = "protocol ip u32 match ip src 192.0.2.1 flowid ffff:1";
    inside(&pid, &format!("tc filter add dev eth1 parent ffff: prio 7 {other}"));
    let stage = stage("sleep 1000", Some(&path_of(&namespace)));
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);
    let filters = |name: &str| inside(&pid, &format!("tc filter show dev {name} parent ffff:"));
    let is_joined = |name| filters(name).contains("mirred");
    assert!(is_joined("eth0") && is_joined("eth1"));
    command(&format!("kill -KILL {}", stage.state()["pid"]));
    wait_for(&stage, "stopped");
    assert!(is_joined("eth0") && is_joined("eth1"));
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(!inside(&pid, "tc qdisc show dev eth0").contains("ingress"));
    assert!(!is_joined("eth1") && filters("eth1").contains("c0000201"), "{}", filters("eth1"));
    assert!(!inside(&pid, "ip link").contains("kiln"));
}

#[test]
fn interface_that_comes_between_create_and_start_is_found() {
    outside();
    let stage = stage("busybox ip -o addr; echo shown; sleep 1000", None);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let pid = stage.state()["pid"].to_string();
    add_interface(&pid, 3);
    succeeds(&stage, &["start", "test"]);
    assert!(pings("10.1.3.5") && pings("fd00:3::5"));
    wait_for_output(&stage, "shown");
    assert!(output(&stage).contains("eth3    inet 10.1.3.5/24"), "{}", output(&stage));
    succeeds(&stage, &["delete", "--force", "test"]);
}

#[test]
fn without_interfaces_there_is_loopback_and_nothing_else() {
    outside();
    let stage = stage("busybox ip -o link; busybox ping -c 1 127.0.0.1", None);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    let text = output(&stage);
    assert_eq!(text.matches("link/").count(), 1, "{text}");
    assert!(text.contains("link/loopback") && text.contains("1 packets received"), "{text}");
    succeeds(&stage, &["delete", "test"]);
}

#[test]
fn several_interfaces_are_joined_and_one_too_many_is_named() {
    outside();
    let namespace = Namespace::new();
    let pid = namespace.pid();
    add_interface(&pid, 0);
    add_interface(&pid, 1);
    let stage = stage("echo up; sleep 1000", Some(&path_of(&namespace)));
    let start = |stage: &Stage| {
        let created = create(stage, &[]);
        assert!(created.status.success(), "{}", errors(&created));
    };
    start(&stage);
    succeeds(&stage, &["start", "test"]);
    assert!(["10.1.0.5", "10.1.1.5", "fd00:1::5"].iter().all(|address| pings(address)));
    succeeds(&stage, &["delete", "--force", "test"]);

    start(&stage);
    add_interface(&pid, 2);
    let refused = kiln(&stage, &["start", "test"]);
    assert!(!refused.status.success());
    assert!(errors(&refused).contains("network interface eth2"), "{}", errors(&refused));
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(!inside(&pid, "ip link").contains("kiln"));
}

#[test]
fn the_callers_own_network_namespace_is_not_taken_over() {
    let stage = stage("true", Some("/proc/self/ns/net"));
    let refused = create(&stage, &[]);
    assert!(errors(&refused).contains("linux.namespaces[2].path"), "{}", errors(&refused));
    assert!(stage.is_clean());
}

#[test]
fn a_rate_is_kept_each_way() {
    const BYTES: usize = 240_000;
    outside();
    let namespace = Namespace::new();
    add_interface(&namespace.pid(), 0);
    let script = format!(
        "head -c {BYTES} /dev/zero | busybox nc 10.1.0.1 6000
        busybox nc 10.1.0.1 6001 | busybox wc -c"
    );
    let stage = stage(&script, Some(&path_of(&namespace)));
    stage.edit(|config| config["annotations"] = json!({"io.kiln.network-rate": "100K"}));
    let [from_guest, to_guest] =
        ["10.1.0.1:6000", "10.1.0.1:6001"].map(|to| TcpListener::bind(to).expect("TCP"));
    // At the least: a busy machine takes longer. Some of it passes before the host has accepted.
    let least = Duration::from_millis(1200);
    let created = create(&stage, &["--network-burst", "10K"]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);

    let mut stream = from_guest.accept().expect("the guest connects").0;
    let begin = Instant::now();
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("reads");
    assert_eq!(received.len(), BYTES);
    assert!(begin.elapsed() > least, "sent in {:?}", begin.elapsed());
    drop(stream);

    let mut stream = to_guest.accept().expect("the guest connects").0;
    let begin = Instant::now();
    stream.write_all(&vec![0; BYTES]).expect("writes");
    drop(stream);
    wait_for_output(&stage, &BYTES.to_string());
    assert!(begin.elapsed() > least, "received in {:?}", begin.elapsed());
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
}
