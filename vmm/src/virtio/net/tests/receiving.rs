//! From the tap to the guest.

use super::*;

/// How many buffers a frame says it lies in.
fn buffers(guest: &Guest<'_>, address: u64) -> u16 {
    let header = guest.bytes(address, HEADER);
    assert_eq!(header[..10], [0; 10]);
    u16::from_le_bytes([header[10], header[11]])
}

#[test]
fn a_frame_lies_in_as_many_buffers_as_it_needs() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), bit::MRG_RXBUF);
    let wire = Wire::of(EXPERIMENTAL);
    guest.offer(0, 16, 512);
    // The first is longer than is expected, the next is not, and the last is shorter.
    for (seed, length) in [(1, 1514), (2, 1514), (3, 500), (4, 501)] {
        wire.send(&frame(length, seed));
    }
    guest.until("four frames arrive", |guest| guest.device.counts().received == 4);
    let whole = [(0, 512), (1, 512), (2, 502), (3, 512), (4, 512), (5, 502), (6, 512)];
    assert_eq!(guest.receive.used(), [&whole[..], &[(7, 512), (8, 1)]].concat());
    for (seed, length, first, count) in
        [(1, 1514, 0, 3), (2, 1514, 3, 3), (3, 500, 6, 1), (4, 501, 7, 2)]
    {
        let at = IN + first * 512;
        assert_eq!(buffers(&guest, at), count);
        assert!(guest.bytes(at + HEADER as u64, length) == frame(length, seed), "frame {seed}");
    }
    // The buffers that were not needed are still there.
    wire.send(&frame(60, 5));
    guest.until("another arrives", |guest| guest.device.counts().received == 5);
    assert_eq!(guest.receive.used()[9], (9, 72));
}

#[test]
fn a_frame_waits_for_buffers_and_the_tap_with_it() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), bit::MRG_RXBUF);
    let wire = Wire::of(EXPERIMENTAL);
    guest.process(Event::Queue(RECEIVE));
    wire.send(&frame(1514, 1));
    wire.send(&frame(1514, 2));
    assert!(!guest.is_called(), "there is no buffer to be woken for");
    for first in 0..2 {
        guest.offer(first, 1, 512);
        assert_eq!(guest.receive.used_count(), 0);
        assert!(!guest.is_called());
    }
    guest.offer(2, 4, 512);
    guest.until("both arrive", |guest| guest.device.counts().received == 2);
    for (seed, first) in [(1, 0), (2, 3)] {
        let at = IN + first * 512;
        assert_eq!(buffers(&guest, at), 3);
        assert!(guest.bytes(at + HEADER as u64, 1514) == frame(1514, seed));
    }
}

#[test]
fn what_the_whole_queue_has_no_room_for_is_dropped() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(9000), bit::MRG_RXBUF);
    let wire = Wire::of(EXPERIMENTAL);
    guest.offer(0, 16, 64);
    wire.send(&frame(16 * 64, 1));
    wire.send(&frame(16 * 64 - HEADER, 2));
    guest.until("one arrives", |guest| guest.device.counts().received == 1);
    assert_eq!(guest.device.counts().receive_dropped, 1);
    assert_eq!(buffers(&guest, IN), 16);
    assert_eq!(guest.receive.used_count(), 16);
}

#[test]
fn without_mergeable_buffers_a_frame_has_one() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), 0);
    let wire = Wire::of(EXPERIMENTAL);
    guest.offer(0, 4, 600);
    wire.send(&frame(1514, 1));
    wire.send(&frame(588, 2));
    wire.send(&frame(589, 3));
    wire.send(&frame(100, 4));
    guest.until("two arrive", |guest| guest.device.counts().received == 2);
    assert_eq!(guest.receive.used(), [(0, 600), (1, 112)]);
    for (seed, length, at) in [(2, 588, IN), (4, 100, IN + 600)] {
        assert_eq!(buffers(&guest, at), 1);
        assert!(guest.bytes(at + HEADER as u64, length) == frame(length, seed));
    }
    assert_eq!(guest.device.counts().receive_dropped, 2);
}

#[test]
fn a_buffer_without_room_for_a_header_breaks_the_queue() {
    let memory = memory();
    let mut guest = Guest::new(&memory, tap::in_a_new_namespace(1500), bit::MRG_RXBUF);
    guest.receive.offer(&[(IN, HEADER as u32 - 1, true)]);
    let mut queues = [&mut guest.receive.queue, &mut guest.transmit.queue];
    let mut queues = Queues { memory: &memory, queues: &mut queues };
    let error = guest.device.process(Event::Queue(RECEIVE), &mut queues).expect_err("broken");
    assert_eq!(error.to_string(), "queue 0 is broken: a receive buffer of 11 bytes");
    assert!(!guest.is_called());
}
