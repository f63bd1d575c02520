//! Limits, as far as no clock is needed to see them.

use super::*;

fn bytes_per_second(count: u64) -> RateConfig {
    RateConfig { bytes_per_second: NonZeroU64::new(count), ..RateConfig::default() }
}

#[test]
fn what_is_over_the_limit_waits_in_its_queue() {
    let memory = memory();
    let tap = tap::in_a_new_namespace(1500);
    let wire = Wire::of(EXPERIMENTAL);
    let limit = bytes_per_second(1);
    let settings = Settings { receive: limit, transmit: limit, ..SETTINGS };
    let mut guest = Guest::with(&memory, tap, bit::MRG_RXBUF, settings);
    // The first of each direction is paid for with 1000 seconds.
    guest.offer(0, 4, 2048);
    for seed in 1..3 {
        wire.send(&frame(1000, seed));
        guest.send([0; HEADER], &frame(1000, seed), 4096);
    }
    guest.until("it has seen the tap", |guest| !guest.is_called());
    assert_eq!(guest.device.counts(), Counts { received: 1, sent: 1, ..Counts::default() });
    assert!(wire.receive() == frame(1000, 1));
    assert_eq!(wire.try_receive(), None);
}

#[test]
fn what_waits_goes_on_by_itself() {
    let memory = memory();
    let tap = tap::in_a_new_namespace(1500);
    let wire = Wire::of(EXPERIMENTAL);
    let limit = bytes_per_second(100_000);
    let settings = Settings { receive: limit, transmit: limit, ..SETTINGS };
    let mut guest = Guest::with(&memory, tap, bit::MRG_RXBUF, settings);
    guest.offer(0, 16, 2048);
    for seed in 1..13 {
        wire.send(&frame(1500, seed));
        guest.send([0; HEADER], &frame(1500, 99), 4096);
    }
    guest.until("all of them pass", |guest| {
        guest.device.counts() == Counts { received: 12, sent: 12, ..Counts::default() }
    });
    for seed in 1..13u8 {
        let at = IN + u64::from(seed - 1) * 2048 + HEADER as u64;
        assert!(guest.bytes(at, 1500) == frame(1500, seed));
    }
}
