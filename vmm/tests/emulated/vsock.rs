//! vsock, with the guest's own driver.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use crate::guest::{Guest, pattern};

fn number(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("8 bytes"))
}

/// Has the guest send `total` bytes of the pattern in writes of `size`.
fn source(guest: &Guest, total: u64, size: u32) -> std::os::unix::net::UnixStream {
    let arguments = [&total.to_le_bytes()[..], &size.to_le_bytes()].concat();
    guest.call(b's', &arguments)
}

/// Has the guest take `sent` by a call of this kind, and checks that it counted every byte.
fn sink(guest: &Guest, kind: u8, sent: &[u8]) {
    let mut stream = guest.call(kind, &[]);
    stream.write_all(sent).expect("writes");
    stream.shutdown(Shutdown::Write).expect("half-closes");
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).expect("reads");
    assert_eq!(number(&answer), sent.len() as u64);
}

#[test]
fn echoes_come_back_whole_whatever_their_size() {
    let guest = Guest::boot(&[], &[]);
    for size in [1, 43, 44, 4095, 4096, 4097, 65535, 65536, 65537, 262_144, 262_145, 1 << 20] {
        let sent = pattern(size);
        let mut stream = guest.call(b'e', &[]);
        let mut writer = stream.try_clone().expect("clones");
        let to_send = sent.clone();
        let sending = thread::spawn(move || {
            writer.write_all(&to_send).expect("writes");
            writer.shutdown(Shutdown::Write).expect("half-closes");
        });
        let mut received = Vec::new();
        stream.read_to_end(&mut received).expect("reads");
        sending.join().expect("sends");
        assert!(received == sent, "{size} bytes came back as {} others", received.len());
    }
    guest.power_off();
}

#[test]
fn large_transfers_are_intact_in_both_directions() {
    let guest = Guest::boot(&[], &[]);
    let total = 50_000_000;
    let expected = pattern(total);
    for size in [65536, 1 << 20] {
        let mut stream = source(&guest, total as u64, size);
        let mut received = Vec::with_capacity(total);
        stream.read_to_end(&mut received).expect("reads");
        assert!(received == expected, "{} bytes, some of them others", received.len());
    }
    sink(&guest, b'k', &expected);
    guest.power_off();
}

#[test]
fn slow_readers_hold_their_writers_back_and_lose_nothing() {
    let guest = Guest::boot(&[], &[]);
    let total = 3_000_000;
    let expected = pattern(total);

    let mut stream = source(&guest, total as u64, 65536);
    // Nobody reads here while others use the device.
    let mut other = source(&guest, total as u64, 65536);
    let mut received = Vec::new();
    other.read_to_end(&mut received).expect("reads");
    assert!(received == expected);
    received.clear();
    let mut piece = vec![0; 100_000];
    loop {
        let count = stream.read(&mut piece).expect("reads");
        if count == 0 {
            break;
        }
        received.extend(&piece[..count]);
        thread::sleep(Duration::from_millis(5));
    }
    assert!(received == expected, "{} bytes", received.len());

    sink(&guest, b'l', &expected);
    guest.power_off();
}

#[test]
fn each_half_closes_by_itself() {
    let guest = Guest::boot(&[], &[]);
    let mut stream = guest.call(b'h', &[]);
    let mut received = Vec::new();
    stream.read_to_end(&mut received).expect("reads to the guest's end");
    assert_eq!(received, b"half");
    stream.write_all(&pattern(300_000)).expect("still writes");
    stream.shutdown(Shutdown::Write).expect("half-closes");
    let mut seen = 0;
    for _ in 0..200 {
        seen = number(&guest.ask(b'H', &[]));
        if seen != 0 {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(seen, 300_000);

    let mut stream = guest.call(b'x', &[]);
    let mut told = [0; 1];
    stream.read_exact(&mut told).expect("reads");
    let refused = loop {
        match stream.write_all(&[0; 4096]) {
            Ok(()) => thread::sleep(Duration::from_millis(1)),
            Err(error) => break error,
        }
    };
    assert_eq!(refused.kind(), std::io::ErrorKind::BrokenPipe);
    guest.power_off();
}

#[test]
fn ports_are_refused_that_are_not_named_or_were_used() {
    let guest = Guest::boot(&[], &[2000]);
    let connect = |port: u32| guest.call(b'c', &port.to_le_bytes());
    let outcome = |stream: &mut std::os::unix::net::UnixStream| {
        let mut errno = [0; 4];
        stream.read_exact(&mut errno).expect("outcome");
        u32::from_le_bytes(errno)
    };
    let reset = libc::ECONNRESET as u32;
    for port in [1024, 1026, u32::MAX - 1] {
        assert_eq!(outcome(&mut connect(port)), reset, "port {port}");
    }
    let mut first = connect(2000);
    assert_eq!(outcome(&mut first), 0);
    let (port, mut accepted) = guest.broker.accept().expect("broker").expect("a connection");
    assert_eq!(port, 2000);
    accepted.set_nonblocking(false).expect("blocking");
    assert_eq!(outcome(&mut connect(2000)), reset);
    accepted.write_all(b"ping").expect("writes");
    accepted.shutdown(Shutdown::Write).expect("half-closes");
    let mut echo = String::new();
    accepted.read_to_string(&mut echo).expect("reads");
    assert_eq!(echo, "ping");
    assert_eq!(outcome(&mut connect(2000)), reset);

    // Towards the guest: nobody listens there, which is an end of file.
    let mut nobody = guest.broker.connect(4000).expect("asks");
    nobody.write_all(b"header").expect("writes");
    let mut nothing = Vec::new();
    nobody.read_to_end(&mut nothing).expect("end of file, no error");
    assert!(nothing.is_empty());
    guest.power_off();
}

#[test]
fn connections_do_not_mix() {
    let guest = Guest::boot(&[], &[]);
    let guest = &guest;
    thread::scope(|scope| {
        for worker in 0..24usize {
            scope.spawn(move || {
                let sent: Vec<u8> = pattern(200_000 + worker * 777)
                    .into_iter()
                    .map(|byte| byte.wrapping_add(worker as u8))
                    .collect();
                let mut stream = guest.call(b'e', &[]);
                let mut writer = stream.try_clone().expect("clones");
                thread::scope(|inner| {
                    inner.spawn(|| {
                        writer.write_all(&sent).expect("writes");
                        writer.shutdown(Shutdown::Write).expect("half-closes");
                    });
                    let mut received = Vec::new();
                    stream.read_to_end(&mut received).expect("reads");
                    assert!(
                        received == sent,
                        "connection {worker}: {} of {}",
                        received.len(),
                        sent.len()
                    );
                });
            });
        }
    });
}

#[test]
fn what_was_sent_before_the_end_of_the_machine_arrives() {
    let guest = Guest::boot(&[], &[]);
    let total = 400_000;
    let mut stream = source(&guest, total as u64, 65536);
    // The guest's write has returned: everything is with the device.
    let mut first = [0; 1];
    stream.read_exact(&mut first).expect("reads");
    thread::sleep(Duration::from_millis(500));
    let reading = thread::spawn(move || {
        thread::sleep(Duration::from_millis(1500));
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).map(|_| rest.len() + 1)
    });
    let mut off = guest.call(b'p', &[]);
    let mut end = Vec::new();
    let _ = off.read_to_end(&mut end);
    assert_eq!(reading.join().expect("no panic").expect("reads"), total);
}
