//! Random descriptor chains, for the tests of every device.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::ring::Ring;
use super::{Event, Queues, VirtioDevice};
use crate::GuestMemory;

/// Size of the guest's memory in these tests.
const MEMORY: u64 = 0x40_000;

/// Size of each queue, and the distance of their bases.
const SIZE: u16 = 16;
const SPACING: u64 = 0x4000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor as the driver writes it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawDescriptor {
    address: u64,
    length: u32,
    flags: u16,
    next: u16,
}

/// Everything that a driver can get wrong about one queue.
#[derive(Debug, Clone)]
pub(crate) struct HostileQueue {
    descriptors: Vec<RawDescriptor>,
    available: Vec<u16>,
    offered: u16,
    /// What lies in the memory that descriptors point to.
    content: Vec<u8>,
}

/// Addresses mostly inside of memory, some at its edge, some anywhere.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 0x10_000..MEMORY,
        1 => MEMORY - 64..MEMORY + 64,
        1 => any::<u64>(),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => Just(44u32),
        3 => Just(16u32),
        3 => Just(1u32),
        3 => Just(512u32),
        4 => 0..5000u32,
        1 => any::<u32>(),
    ]
}

fn descriptor(indirect: bool) -> impl Strategy<Value = RawDescriptor> {
    let flags = prop_oneof![
        Just(0),
        Just(NEXT),
        Just(NEXT),
        Just(WRITE),
        Just(NEXT | WRITE),
        Just(if indirect { INDIRECT } else { NEXT }),
        any::<u16>().prop_map(move |flags| if indirect { flags } else { flags & !INDIRECT }),
    ];
    (address(), length(), flags, 0..SIZE + 2)
        .prop_map(|(address, length, flags, next)| RawDescriptor { address, length, flags, next })
}

pub(crate) fn hostile_queue(indirect: bool) -> impl Strategy<Value = HostileQueue> {
    (
        prop::collection::vec(descriptor(indirect), usize::from(SIZE)),
        prop::collection::vec(0..SIZE + 1, usize::from(SIZE)),
        prop_oneof![8 => 0..SIZE + 1, 1 => any::<u16>()],
        prop::collection::vec(prop_oneof![2 => Just(0u8), 1 => 0..8u8, 1 => any::<u8>()], 512),
    )
        .prop_map(|(descriptors, available, offered, content)| HostileQueue {
            descriptors,
            available,
            offered,
            content,
        })
}

/// Lets a device process hostile queues and checks that it has written nowhere but to buffers that
/// the driver made writable, and to the used rings.
pub(crate) fn check(device: &mut dyn VirtioDevice, queues: &[HostileQueue], indirect: bool) {
    let ranges = [(GuestAddress(0), 0x20_000), (GuestAddress(0x20_000), 0x20_000)];
    let memory = GuestMemory::from_ranges(&ranges).expect("memory");
    let mut rings: Vec<Ring<'_>> =
        (0..).zip(queues).map(|(index, _)| Ring::new(&memory, index * SPACING, SIZE)).collect();
    for (hostile, ring) in queues.iter().zip(&rings) {
        let [descriptors, available, _] = ring.addresses();
        for start in (0x10_000..MEMORY).step_by(hostile.content.len()) {
            memory.write_slice(&hostile.content, GuestAddress(start)).expect("in memory");
        }
        for (index, raw) in (0..).zip(&hostile.descriptors) {
            let at = descriptors + 16 * index;
            memory.write_obj(raw.address, GuestAddress(at)).expect("in memory");
            memory.write_obj(raw.length, GuestAddress(at + 8)).expect("in memory");
            memory.write_obj(raw.flags, GuestAddress(at + 12)).expect("in memory");
            memory.write_obj(raw.next, GuestAddress(at + 14)).expect("in memory");
        }
        for (index, head) in (0..).zip(&hostile.available) {
            memory.write_obj(*head, GuestAddress(available + 4 + 2 * index)).expect("in memory");
        }
        memory.write_obj(hostile.offered, GuestAddress(available + 2)).expect("in memory");
    }
    let mut before = vec![0; MEMORY as usize];
    memory.read_slice(&mut before, GuestAddress(0)).expect("in memory");

    let mut writable = vec![false; MEMORY as usize];
    let mut allow = |start: u64, length: u64| {
        let start = start.min(MEMORY) as usize;
        let end = (start as u64).saturating_add(length).min(MEMORY) as usize;
        writable[start..end].fill(true);
    };
    for (hostile, ring) in queues.iter().zip(&rings) {
        allow(ring.addresses()[2], 6 + 8 * u64::from(SIZE));
        for raw in &hostile.descriptors {
            if raw.flags & WRITE != 0 {
                allow(raw.address, raw.length.into());
            }
        }
    }

    let mut sides: Vec<_> = rings.iter_mut().map(|ring| &mut ring.queue).collect();
    let events = (0..queues.len() as u16).map(Event::Queue).chain([Event::Host, Event::Host]);
    for event in events {
        let mut queues = Queues { memory: &memory, queues: &mut sides };
        if device.process(event, &mut queues).is_err() {
            break;
        }
    }

    // An indirect table is itself random memory: there only the absence of panics is checked.
    if !indirect {
        let mut after = vec![0; MEMORY as usize];
        memory.read_slice(&mut after, GuestAddress(0)).expect("in memory");
        let touched = (0..MEMORY as usize).find(|at| before[*at] != after[*at] && !writable[*at]);
        assert_eq!(touched, None, "memory was written that the driver did not give");
    }
    device.reset();
}
