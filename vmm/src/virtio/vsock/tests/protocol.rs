//! What each packet leads to.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use super::*;
use crate::virtio::vsock::packet::{SHUTDOWN_RECEIVE, SHUTDOWN_SEND};
use crate::virtio::vsock::{BUFFER_SIZE, MAX_CONNECTIONS, MAX_REPLIES};

const BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

fn shutdown(guest_port: u32, host_port: u32, flags: u32) -> Header {
    Header { flags, ..header(Op::Shutdown, guest_port, host_port) }
}

/// Reads to the end of file.
fn rest(mut stream: UnixStream) -> Vec<u8> {
    stream.set_nonblocking(false).expect("blocking");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("end of file, no error");
    bytes
}

#[test]
fn packets_of_nothing_are_reset() {
    let mut harness = Harness::new(&[1024]);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        harness.send(header(op, 5, 1024), &[]);
        let reset = harness.only();
        assert_eq!(reset.op(), Some(Op::Reset), "{op:?}");
        assert_eq!((reset.header.src_port, reset.header.dst_port), (1024, 5));
        assert_eq!((reset.header.src_cid, reset.header.dst_cid), (HOST_CID, CID));
    }
    harness.send(header(Op::Reset, 5, 1024), &[]);
    assert!(harness.all().is_empty(), "a reset is not answered");
}

#[test]
fn foreign_addresses_and_types_are_reset_and_touch_no_connection() {
    let mut harness = Harness::new(&[1024]);
    let mut stream = harness.connect_to_host(5, 1024);
    let data = header(Op::Data, 5, 1024);
    for foreign in [
        Header { src_cid: 4, ..data },
        Header { dst_cid: 4, ..data },
        Header { kind: 2, ..data },
        Header { op: Op::Request as u16, dst_cid: 0, ..data },
    ] {
        harness.send(foreign, b"data");
        let reset = harness.only();
        assert_eq!(reset.op(), Some(Op::Reset));
        assert_eq!(reset.header.src_cid, foreign.dst_cid);
        assert_eq!(reset.header.kind, foreign.kind);
    }
    assert_eq!(stream.read(&mut [0; 8]).expect_err("nothing").kind(), ErrorKind::WouldBlock);
    harness.send(data, b"data");
    let mut bytes = [0; 4];
    stream.read_exact(&mut bytes).expect("still connected");
}

#[test]
fn lengths_that_do_not_fit_reset_the_connection() {
    type Wrong = fn(Header) -> Header;
    let cases: [Wrong; 4] = [
        |data| Header { len: 5, ..data },
        |data| Header { len: u32::MAX, ..data },
        |data| Header { len: 4, op: Op::CreditUpdate as u16, ..data },
        |data| Header { op: 99, ..data },
    ];
    for wrong in cases {
        let mut harness = Harness::new(&[1024]);
        let stream = harness.connect_to_host(5, 1024);
        harness.send_raw(wrong(header(Op::Data, 5, 1024)), b"data");
        assert_eq!(harness.only().op(), Some(Op::Reset));
        assert!(rest(stream).is_empty());
    }
}

#[test]
fn a_host_port_is_connected_to_once_in_the_device_s_life() {
    let mut harness = Harness::new(&[1024, 1030]);
    let request = |port| header(Op::Request, 5, port);
    harness.send(request(1025), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset), "a port that isn't named");
    let first = harness.connect_to_host(5, 1024);
    harness.send(header(Op::Request, 6, 1024), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset), "while the first lives");
    harness.mux.reset();
    assert!(rest(first).is_empty());
    harness.send(request(1024), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset), "and after a reset");
    harness.connect_to_host(5, 1030);
    assert!(harness.monitor.try_accept().is_err());
}

#[test]
fn a_connection_can_not_be_opened_twice() {
    let mut harness = Harness::new(&[1024]);
    let stream = harness.connect_to_host(5, 1024);
    harness.send(header(Op::Request, 5, 1024), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset));
    assert!(rest(stream).is_empty());

    let (port, stream) = harness.connect_to_guest(9);
    harness.send(header(Op::Response, 9, port), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset), "a second response");
    assert!(rest(stream).is_empty());
}

#[test]
fn a_refused_connection_is_end_of_file_even_if_written_to() {
    let mut harness = Harness::new(&[]);
    let mut stream = harness.monitor.try_connect(7).expect("broker");
    stream.write_all(b"header").expect("writes");
    let request = harness.only();
    harness.send(header(Op::Reset, 7, request.header.src_port), &[]);
    assert!(rest(stream).is_empty());
}

#[test]
fn what_was_written_before_the_guest_accepts_arrives_though_the_writer_is_gone() {
    let mut harness = Harness::new(&[]);
    let mut stream = harness.monitor.try_connect(7).expect("broker");
    stream.write_all(b"early").expect("writes");
    drop(stream);
    let port = harness.only().header.src_port;
    harness.send(header(Op::Response, 7, port), &[]);
    let packets = harness.all();
    assert_eq!(packets[0].data, b"early");
    assert_eq!(packets[1].op(), Some(Op::Shutdown));
    assert_eq!(packets[1].header.flags, BOTH);
    assert_eq!(packets.len(), 2);
}

#[test]
fn the_guest_s_credit_is_never_exceeded_and_asked_for_once() {
    let mut harness = Harness::new(&[]);
    let (port, mut stream) = harness.connect_to_guest(7);
    let update =
        |buf_alloc, fwd_cnt| Header { buf_alloc, fwd_cnt, ..header(Op::CreditUpdate, 7, port) };
    harness.send(update(10_000, 0), &[]);
    let _ = stream.write(&[1; 100_000]).expect("writes");
    let packets = harness.all();
    let (last, data) = packets.split_last().expect("packets");
    assert_eq!(data.iter().map(|packet| packet.data.len()).sum::<usize>(), 10_000);
    assert_eq!(last.op(), Some(Op::CreditRequest));

    harness.send(update(10_000, 0), &[]);
    assert!(harness.all().is_empty(), "no credit, no second question");
    harness.send(update(10_000, 4_000), &[]);
    let sent: usize = harness.all().iter().map(|packet| packet.data.len()).sum();
    assert_eq!(sent, 4_000);
    harness.send(update(5_000, 4_000), &[]);
    assert!(harness.all().is_empty(), "a window that shrinks below what is in flight");
    harness.send(update(5_000, 999_999), &[]);
    assert!(harness.all().is_empty(), "more forwarded than was ever sent");
}

#[test]
fn a_slow_host_holds_the_guest_back_and_gets_everything() {
    let mut harness = Harness::new(&[]);
    let (port, mut stream) = harness.connect_to_guest(7);
    let mut sent = 0u32;
    let (mut told, mut received) = (0u32, Vec::new());
    let mut piece = vec![0; 50_000];
    while sent < 3_000_000 {
        // The guest sends whatever its credit allows.
        while BUFFER_SIZE - (sent - told) >= 1000 {
            let data: Vec<u8> = (sent..sent + 1000).map(|at| (at / 3) as u8).collect();
            harness.send(header(Op::Data, 7, port), &data);
            sent += 1000;
        }
        let count = stream.read(&mut piece).expect("there is something");
        received.extend(&piece[..count]);
        for packet in harness.all() {
            assert_eq!(packet.op(), Some(Op::CreditUpdate));
            assert_eq!(packet.header.buf_alloc, BUFFER_SIZE);
            told = packet.header.fwd_cnt;
        }
    }
    harness.send(shutdown(7, port, BOTH), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset));
    harness.mux.reset();
    let reader = std::thread::spawn(move || {
        received.extend(rest(stream));
        received
    });
    while !reader.is_finished() {
        harness.poll();
        std::thread::yield_now();
    }
    let received = reader.join();
    let expected: Vec<u8> = (0..sent).map(|at| (at / 3) as u8).collect();
    assert!(received.expect("no panic") == expected);
}

#[test]
fn more_than_the_credit_resets_the_connection() {
    let mut harness = Harness::new(&[]);
    let (port, _stream) = harness.connect_to_guest(7);
    let data = vec![0; 60_000];
    // What the host's socket holds is not held against the guest.
    for _ in 0..20 {
        harness.send(header(Op::Data, 7, port), &data);
    }
    assert!(harness.all().iter().any(|packet| packet.op() == Some(Op::Reset)));
}

#[test]
fn credit_is_told_when_asked_for() {
    let mut harness = Harness::new(&[]);
    let (port, _stream) = harness.connect_to_guest(7);
    harness.send(header(Op::Data, 7, port), &[0; 10]);
    assert!(harness.all().is_empty(), "ten bytes are not worth a packet");
    harness.send(header(Op::CreditRequest, 7, port), &[]);
    let update = harness.only();
    assert_eq!(update.op(), Some(Op::CreditUpdate));
    assert_eq!((update.header.buf_alloc, update.header.fwd_cnt), (BUFFER_SIZE, 10));
}

#[test]
fn halves_close_one_by_one() {
    let mut harness = Harness::new(&[]);
    let (port, mut stream) = harness.connect_to_guest(7);
    harness.send(header(Op::Data, 7, port), b"last words");
    harness.send(shutdown(7, port, SHUTDOWN_SEND), &[]);
    assert!(harness.all().is_empty());
    stream.write_all(b"go on").expect("the other half is open");
    assert_eq!(harness.only().data, b"go on");
    harness.send(header(Op::Data, 7, port), b"more");
    assert_eq!(harness.only().op(), Some(Op::Reset), "data after its end");
    assert_eq!(rest(stream), b"last words");

    let (port, mut stream) = harness.connect_to_guest(8);
    stream.shutdown(Shutdown::Write).expect("half-closes");
    let end = harness.only();
    assert_eq!((end.op(), end.header.flags), (Some(Op::Shutdown), SHUTDOWN_SEND));
    harness.send(header(Op::Data, 8, port), b"answer");
    let mut answer = [0; 6];
    stream.read_exact(&mut answer).expect("the other half is open");
    drop(stream);
    let end = harness.only();
    assert_eq!((end.op(), end.header.flags), (Some(Op::Shutdown), BOTH));
    harness.send(shutdown(8, port, BOTH), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset));

    let (port, mut stream) = harness.connect_to_guest(9);
    harness.send(shutdown(9, port, SHUTDOWN_RECEIVE), &[]);
    let error = stream.write(b"unwanted").expect_err("the guest reads no more");
    assert_eq!(error.kind(), ErrorKind::BrokenPipe);
    harness.send(header(Op::Data, 9, port), b"still");
    let mut still = [0; 5];
    stream.read_exact(&mut still).expect("but goes on sending");
}

#[test]
fn a_reader_that_is_gone_is_told_to_the_guest_whose_data_is_dropped() {
    let mut harness = Harness::new(&[]);
    let (port, stream) = harness.connect_to_guest(7);
    drop(stream);
    for _ in 0..10 {
        harness.send(header(Op::Data, 7, port), &vec![0; BUFFER_SIZE as usize / 2]);
    }
    let packets = harness.all();
    assert!(packets.iter().all(|packet| packet.op() != Some(Op::Reset)), "{packets:?}");
    let told = packets.iter().filter(|packet| packet.op() == Some(Op::Shutdown));
    assert_ne!(told.fold(0, |flags, packet| flags | packet.header.flags) & SHUTDOWN_RECEIVE, 0);
}

#[test]
fn answers_are_bounded() {
    let mut harness = Harness::new(&[]);
    let mut sent = 0;
    while harness.mux.has_room() {
        harness.send(header(Op::Data, sent, 1024), &[]);
        sent += 1;
    }
    assert_eq!(sent as usize, MAX_REPLIES);
    assert_eq!(harness.all().len(), MAX_REPLIES);
    assert!(harness.mux.has_room());
}

#[test]
fn connections_are_bounded() {
    let mut harness = Harness::new(&[1024]);
    let mut streams: Vec<_> =
        (0..MAX_CONNECTIONS as u32).map(|port| harness.connect_to_guest(port)).collect();
    let one_more = harness.monitor.try_connect(7).expect("broker");
    harness.send(header(Op::Request, 5, 1024), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset));
    assert!(rest(one_more).is_empty(), "refused, not forgotten");

    let (port, stream) = streams.remove(3);
    harness.send(header(Op::Reset, 3, port), &[]);
    assert!(rest(stream).is_empty());
    harness.connect_to_host(5, 1024);
}

#[test]
fn the_monitor_s_end_ends_no_connection() {
    let mut harness = Harness::new(&[1024]);
    let (port, mut stream) = harness.connect_to_guest(7);
    harness.monitor = Broker::pair().expect("broker").0;
    harness.send(header(Op::Request, 5, 1024), &[]);
    assert_eq!(harness.only().op(), Some(Op::Reset), "nobody is there to accept");
    harness.send(header(Op::Data, 7, port), b"data");
    let mut data = [0; 4];
    stream.read_exact(&mut data).expect("still connected");
}
