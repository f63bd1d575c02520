//! How fast a guest's network is: kiln's device over vhost-user beside QEMU's own on the same kind of tap,
//! in the same run, with the same kernel and program in the guest.
//!
//! Run as root with `KILN_LIB_DIR` naming the guest kernel's directory. One TCP connection; the guest
//! runs under QEMU's software CPU, which takes most of the time on both sides. Limit: from guest to
//! host kiln's is at least 0.6 times as fast.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "../tests/emulated/guest.rs"]
#[allow(dead_code, reason = "it needs no disks")]
mod guest;
#[path = "../tests/tap/mod.rs"]
mod tap;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::Instant;

use guest::Guest;
use kiln_vmm::config::RateConfig;
use kiln_vmm::virtio::net::Settings;

/// How often each is measured, in turns.
const ROUNDS: usize = 3;
const BYTES: usize = 128 << 20;
const LIMIT: f64 = 0.6;

#[derive(Debug, Clone, Copy)]
enum Card {
    Kiln,
    Qemu,
}

fn boot(card: Card) -> Guest {
    let tap = tap::in_a_new_namespace(1500);
    tap::ip(&format!("addr add 10.9.0.1/24 dev {}", tap::NAME));
    let (receive, transmit) = (RateConfig::default(), RateConfig::default());
    let guest = match card {
        Card::Kiln => {
            let mac = [2, 0, 0, 0, 0, 1];
            Guest::boot_on(tap, Settings { mac, mtu: Some(1500), receive, transmit })
        }
        Card::Qemu => Guest::boot_on_qemus(tap),
    };
    guest.ask(b'n', &[]);
    guest
}

/// A connection on which the guest takes a command.
fn connection(guest: &Guest) -> TcpStream {
    let listener = TcpListener::bind("10.9.0.1:0").unwrap();
    let port = u32::from(listener.local_addr().unwrap().port());
    std::mem::forget(guest.call(b't', &[0u32.to_le_bytes(), port.to_le_bytes()].concat()));
    listener.accept().unwrap().0
}

/// MiB a second from the guest.
fn from_guest(guest: &Guest) -> f64 {
    let mut stream = connection(guest);
    stream.write_all(b"f").unwrap();
    stream.write_all(&(BYTES as u64).to_le_bytes()).unwrap();
    stream.write_all(&(1u32 << 20).to_le_bytes()).unwrap();
    let mut buffer = vec![0; 1 << 20];
    let begin = Instant::now();
    let mut count = 0;
    while let Ok(got @ 1..) = stream.read(&mut buffer) {
        count += got;
    }
    assert_eq!(count, BYTES);
    speed(begin)
}

/// MiB a second to the guest.
fn to_guest(guest: &Guest) -> f64 {
    let mut stream = connection(guest);
    stream.write_all(b"o").unwrap();
    let buffer = vec![0; 1 << 20];
    let begin = Instant::now();
    for _ in 0..BYTES / buffer.len() {
        stream.write_all(&buffer).unwrap();
    }
    stream.shutdown(Shutdown::Write).unwrap();
    stream.read_exact(&mut [0; 8]).unwrap();
    speed(begin)
}

fn speed(begin: Instant) -> f64 {
    (BYTES >> 20) as f64 / begin.elapsed().as_secs_f64()
}

/// Both speeds of a freshly booted guest, on a thread that has a network namespace of its own.
fn measure(card: Card) -> [f64; 2] {
    let measuring = move || {
        let guest = boot(card);
        // The first transfer finds nothing translated yet.
        from_guest(&guest);
        to_guest(&guest);
        let speeds = [from_guest(&guest), to_guest(&guest)];
        guest.power_off();
        speeds
    };
    let speeds = thread::spawn(measuring).join().unwrap();
    println!("{card:?}: {:.0} MiB/s from the guest, {:.0} to it", speeds[0], speeds[1]);
    speeds
}

/// The speeds of both cards in one round, from the guest and to it, in MiB/s.
struct Round {
    ours: [f64; 2],
    theirs: [f64; 2],
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let round = |_| Round { ours: measure(Card::Kiln), theirs: measure(Card::Qemu) };
    let rounds: Vec<Round> = (0..ROUNDS).map(round).collect();
    for (way, name) in ["guest to host", "host to guest"].into_iter().enumerate() {
        let of = |pick: fn(&Round, usize) -> f64| {
            median(rounds.iter().map(|round| pick(round, way)).collect())
        };
        let (ours, theirs) = (of(|round, way| round.ours[way]), of(|round, way| round.theirs[way]));
        let ratio = of(|round, way| round.ours[way] / round.theirs[way]);
        let verdict = match way {
            0 if ratio >= LIMIT => "limit 0.6: met",
            0 => "limit 0.6: NOT met",
            _ => "no limit",
        };
        println!(
            "net, {name}: median {ours:.0} MiB/s against QEMU's own {theirs:.0}, ratio {ratio:.2}, \
             {verdict}"
        );
    }
}
