//! The network, with the guest's own driver and TCP/IP on both sides.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use kiln_vmm::config::RateConfig;
use kiln_vmm::virtio::net::Settings;

use crate::guest::{Guest, pattern};
use crate::tap;

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 0x1d];
const HOST: [&str; 2] = ["10.9.0.1", "fd09::1"];
const GUEST: [&str; 2] = ["10.9.0.2", "fd09::2"];

/// How long the guest may keep silent.
const PATIENCE: Duration = Duration::from_secs(300);

/// Boots a guest on a network of its own with this MTU, and sets both ends up. Returns what the guest
/// says of its card: MTU, address, carrier and features, a line each.
fn boot(mtu: Option<u16>) -> (Guest, Vec<String>) {
    let tap = tap::in_a_new_namespace(mtu.unwrap_or(1500));
    tap::set_ipv6(true);
    tap::ip(&format!("addr add {}/24 dev {}", HOST[0], tap::NAME));
    tap::ip(&format!("addr add {}/64 dev {} nodad", HOST[1], tap::NAME));
    let (receive, transmit) = (RateConfig::default(), RateConfig::default());
    let guest = Guest::boot_on(tap, Settings { mac: MAC, mtu, receive, transmit });
    let card = set_up(&guest);
    (guest, card)
}

fn set_up(guest: &Guest) -> Vec<String> {
    let said = String::from_utf8(guest.ask(b'n', &[])).expect("text");
    said.lines().map(str::to_owned).collect()
}

/// Arguments of a command about a port: IPv6 or not, and which.
fn port(v6: bool, number: u16) -> Vec<u8> {
    [u32::from(v6).to_le_bytes(), u32::from(number).to_le_bytes()].concat()
}

fn address(texts: [&str; 2], v6: bool, port: u16) -> SocketAddr {
    SocketAddr::new(texts[usize::from(v6)].parse().expect("address"), port)
}

/// A TCP connection on which the guest takes commands, that it has made.
fn called_by(guest: &Guest, v6: bool) -> TcpStream {
    let listener = TcpListener::bind(address(HOST, v6, 0)).expect("listens");
    let own = listener.local_addr().expect("address").port();
    // The guest calls until it has an answer; it never says anything on this connection.
    std::mem::forget(guest.call(b't', &port(v6, own)));
    let (stream, _) = listener.accept().expect("accepts");
    stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
    stream
}

/// The same, but that the host makes.
fn calling(guest: &Guest, v6: bool, number: u16) -> TcpStream {
    let mut server = guest.call(b'T', &port(v6, number));
    server.read_exact(&mut [0; 4]).expect("it listens");
    std::mem::forget(server);
    let stream = TcpStream::connect(address(GUEST, v6, number)).expect("connects");
    stream.set_read_timeout(Some(PATIENCE)).expect("time-out");
    stream
}

/// Has the guest send bytes, and checks them.
fn download(mut stream: TcpStream, length: usize) {
    stream.write_all(b"s").expect("command");
    stream.write_all(&(length as u64).to_le_bytes()).expect("length");
    stream.write_all(&(256u32 << 10).to_le_bytes()).expect("size of its writes");
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("reads");
    assert!(received == pattern(length), "{} of {length} bytes", received.len());
}

/// Sends bytes to the guest, and has it check them.
fn upload(mut stream: TcpStream, length: usize) {
    stream.write_all(b"k").expect("command");
    stream.write_all(&pattern(length)).expect("sends");
    stream.shutdown(Shutdown::Write).expect("half-closes");
    let mut count = [0; 8];
    stream.read_exact(&mut count).expect("answer");
    assert_eq!(u64::from_le_bytes(count), length as u64);
}

/// Has the guest send back datagrams of these sizes.
fn echo(guest: &Guest, command: u8, v6: bool, number: u16, sizes: &[usize]) {
    let mut server = guest.call(command, &port(v6, number));
    server.read_exact(&mut [0; 4]).expect("it is there");
    let socket = UdpSocket::bind(address(HOST, v6, 0)).expect("socket");
    socket.connect(address(GUEST, v6, number)).expect("address");
    socket.set_read_timeout(Some(PATIENCE)).expect("time-out");
    for size in sizes {
        let sent = pattern(*size);
        assert_eq!(socket.send(&sent).expect("sends"), *size);
        let mut received = vec![0; 1 << 16];
        let count = socket.recv(&mut received).expect("an answer");
        assert!(received[..count] == sent, "{count} of {size} bytes");
    }
}

/// The mean size of packets from the tap and to it, since `before`.
fn mean_sizes(before: [(u64, u64); 2]) -> [u64; 2] {
    let after = tap::counters();
    [0, 1].map(|way| (after[way].1 - before[way].1) / (after[way].0 - before[way].0).max(1))
}

#[test]
fn tcp_udp_and_pings_go_both_ways() {
    const LENGTH: usize = 8 << 20;

    let (guest, card) = boot(None);
    assert_eq!(card[..3], ["1500", "02:00:00:00:00:1d", "1"]);
    // Which are set, from bit 0 on: both sides' checksums and segmentation, mergeable buffers.
    for bit in [0, 1, 5, 7, 8, 11, 12, 15, 16, 28, 29, 32] {
        assert_eq!(card[3].as_bytes()[bit], b'1', "feature {bit} of {}", card[3]);
    }
    // There is no control queue.
    assert_eq!(card[3].as_bytes()[17], b'0');

    let answered = guest.ask(b'g', &[20u32.to_le_bytes(), 1000u32.to_le_bytes()].concat());
    assert_eq!(answered, 20u32.to_le_bytes());
    for v6 in [false, true] {
        echo(&guest, b'u', v6, 7, &[0, 1, 17, 1000, 1400, 5000, 40_000]);
        let before = tap::counters();
        download(called_by(&guest, v6), LENGTH);
        download(calling(&guest, v6, 8), LENGTH);
        let [from_guest, _] = mean_sizes(before);
        let before = tap::counters();
        upload(called_by(&guest, v6), LENGTH);
        upload(calling(&guest, v6, 9), LENGTH);
        let [_, to_guest] = mean_sizes(before);
        // Segments are cut and put together by neither side.
        assert!(from_guest > 4000 && to_guest > 4000, "{from_guest} and {to_guest} bytes a packet");
    }
    assert_eq!(guest.ask(b'N', &[]), b"0\n0\n0\n");
    guest.power_off();
}

#[test]
fn a_large_mtu_is_the_guests_too() {
    let (guest, card) = boot(Some(9000));
    assert_eq!(card[0], "9000");
    echo(&guest, b'U', false, 7, &[8972, 9000 - 28 - 1, 1473]);
    upload(called_by(&guest, false), 4 << 20);
    download(called_by(&guest, false), 4 << 20);
    guest.power_off();
}

#[test]
fn a_small_mtu_is_the_guests_too() {
    let (guest, card) = boot(Some(1280));
    assert_eq!(card[0], "1280");
    echo(&guest, b'U', false, 7, &[1252]);
    download(called_by(&guest, true), 1 << 20);
    guest.power_off();
}

#[test]
fn a_driver_that_comes_back_finds_the_card_as_it_was() {
    let (guest, card) = boot(Some(1400));
    for round in 0..3 {
        download(called_by(&guest, false), 256 << 10);
        assert_eq!(guest.ask(b'R', &[]), [0; 4], "round {round}");
        assert_eq!(set_up(&guest), card);
    }
    upload(called_by(&guest, false), 256 << 10);
    guest.power_off();
}
