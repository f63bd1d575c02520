//! From the guest to the tap.

use super::*;

const TCPV4: u8 = 1;
const UDP: u8 = 3;
const UDP_L4: u8 = 5;

#[test]
fn frames_go_out_as_they_are_however_they_are_cut() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), 0);
    let wire = Wire::of(EXPERIMENTAL);
    for (length, piece) in [(14, 4096), (60, 12), (1514, 4096), (1514, 100), (1514, 700)] {
        let sent = frame(length, piece as u8);
        guest.send([0; HEADER], &sent, piece);
        assert!(wire.receive() == sent, "{length} bytes in pieces of {piece}");
    }
    assert_eq!(guest.transmit.used_count(), 5);
    assert_eq!(guest.device.counts(), Counts { sent: 5, ..Counts::default() });
    assert!(!guest.is_called());
}

#[test]
fn frames_that_cannot_be_sent_are_dropped_and_counted() {
    let memory = memory();
    let features = bit::CSUM | bit::HOST_TSO4;
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), features);
    let wire = Wire::of(EXPERIMENTAL);
    let refused = [
        (header(0, 0, 0, 0, 0), 13),
        (header(1, 0, 0, 60, 39), 100),
        (header(1, 0, 0, u16::MAX, u16::MAX), 100),
        (header(0, TCPV4, 1000, 34, 16), 1514),
        (header(1, TCPV4, 47, 34, 16), 1514),
        (header(1, TCPV4, 0, 34, 16), 1514),
        (header(1, TCPV4 | 0x80, 1000, 34, 16), 1514),
        (header(1, UDP_L4, 1000, 34, 6), 1514),
        (header(1, UDP, 1000, 34, 6), 1514),
        (header(1, 0x80, 1000, 34, 6), 1514),
        (header(0, 77, 1000, 34, 6), 1514),
    ];
    for (header, length) in refused {
        guest.send(header, &frame(1514, 1)[..length], 4096);
    }
    let longer_than_it_is = {
        let mut header = header(1, TCPV4, 1000, 34, 16);
        header[2] = 0xff;
        header[3] = 0xff;
        header
    };
    guest.send(longer_than_it_is, &frame(1514, 1), 4096);
    guest.transmit.offer(&[(OUT, HEADER as u32 - 1, false)]);
    guest.transmit.offer(&[(OUT, MAX_FRAME as u32 + HEADER as u32 + 1, false)]);
    guest.process(Event::Queue(TRANSMIT));
    let dropped = refused.len() as u64 + 3;
    assert_eq!(u64::from(guest.transmit.used_count()), dropped);
    assert_eq!(guest.device.counts(), Counts { send_dropped: dropped, ..Counts::default() });
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn flags_that_mean_nothing_here_are_ignored() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), 0);
    let wire = Wire::of(EXPERIMENTAL);
    guest.send(header(0xfe, 0, 0, 0, 0), &frame(100, 1), 4096);
    assert!(wire.receive() == frame(100, 1));
}

#[test]
fn a_checksum_left_to_the_host_needs_the_feature() {
    let memory = memory();
    let tap = tap::in_a_new_namespace(1500);
    let mut guest = Guest::new(&memory, tap, 0);
    guest.send(header(1, 0, 0, 34, 16), &frame(100, 1), 4096);
    assert_eq!(guest.device.counts().send_dropped, 1);
    guest.device.ack_features(bit::CSUM);
    guest.send(header(1, 0, 0, 34, 16), &frame(100, 1), 4096);
    assert_eq!(guest.device.counts().sent, 1);
}

#[test]
fn a_frame_to_be_segmented_passes_whole() {
    let memory = memory();
    let features = bit::CSUM | bit::HOST_TSO4;
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), features);
    let wire = Wire::of(0x0800);
    // An IPv4 header without options, and a TCP header.
    let mut sent = frame(60_000, 7);
    sent[12..14].copy_from_slice(&[8, 0]);
    sent[14..54].fill(0);
    sent[14] = 0x45;
    sent[16..18].copy_from_slice(&(60_000u16 - 14).to_be_bytes());
    (sent[22], sent[23], sent[46]) = (64, 6, 0x50);
    let mut header = header(1, TCPV4, 1448, 34, 16);
    header[2] = 54;
    guest.send(header, &sent, 4096);
    assert_eq!(guest.device.counts(), Counts { sent: 1, ..Counts::default() });
    assert!(wire.receive() == sent);
}
