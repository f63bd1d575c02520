//! Drivers that break every rule.

use std::sync::OnceLock;

use proptest::prelude::*;

use super::*;
use crate::virtio::chains::{check, hostile_queue};

thread_local! {
    /// One for all cases: a tap takes a while to make.
    static TAP: OnceLock<(OwnedFd, Wire)> = const { OnceLock::new() };
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn hostile_queues_are_survived(
        receive in hostile_queue(false),
        transmit in hostile_queue(false),
        features in any::<u64>(),
    ) {
        on_a_tap(&[receive, transmit], features, false);
    }

    #[test]
    fn hostile_indirect_tables_are_survived(
        receive in hostile_queue(true),
        transmit in hostile_queue(true),
        features in any::<u64>(),
    ) {
        on_a_tap(&[receive, transmit], features, true);
    }

    #[test]
    fn any_header_is_survived(
        bytes in any::<[u8; HEADER]>(),
        small in prop::collection::vec(0..6u8, HEADER),
        length in prop_oneof![Just(1514usize), 0..9000usize],
        features in any::<u64>(),
    ) {
        TAP.with(|tap| {
            let (tap, _) = tap.get_or_init(open);
            let memory = memory();
            let mut guest = Guest::new(&memory, tap.try_clone().expect("clones"), features);
            guest.send(bytes, &frame(length.max(14), 1)[..length.max(1)], 4096);
            guest.send(small.try_into().expect("as long"), &frame(length.max(14), 1), 4096);
            prop_assert_eq!(guest.transmit.used_count(), 2);
            let counts = guest.device.counts();
            prop_assert_eq!(counts.sent + counts.send_dropped, 2);
            Ok(())
        })?;
    }
}

fn open() -> (OwnedFd, Wire) {
    let tap = tap::in_a_new_namespace(9000);
    (tap, Wire::of(EXPERIMENTAL))
}

fn on_a_tap(queues: &[crate::virtio::chains::HostileQueue], features: u64, indirect: bool) {
    TAP.with(|tap| {
        let (tap, wire) = tap.get_or_init(open);
        let mut device = Net::new(tap.try_clone().expect("clones"), SETTINGS).expect("device");
        device.ack_features(features);
        for length in [60, 1514, 9014] {
            wire.send(&frame(length, 1));
        }
        check(&mut device, queues, indirect);
    });
}
