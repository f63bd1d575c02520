//! The device with a driver of the tests' own.

use rustix::fs::fstat;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::*;
use crate::GuestMemory;
use crate::virtio::ring::Ring;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

/// Has the device serve a queue in which one chain is offered.
fn serve(
    memory: &GuestMemory,
    index: u16,
    buffers: &[(u64, u32, bool)],
) -> Result<Used, DeviceError> {
    let mut rings = [0x1000, 0x4000, 0x7000].map(|base| Ring::new(memory, base, 32));
    rings[usize::from(index)].offer(buffers);
    let mut queues: Vec<_> = rings.iter_mut().map(|ring| &mut ring.queue).collect();
    let queues = &mut Queues { memory, queues: &mut queues };
    let used = Balloon::new().process(Event::Queue(index), queues);
    if used.is_ok() {
        assert_eq!(rings[usize::from(index)].used(), [(0, 0)]);
    }
    used
}

/// How much of the host's memory the guest's takes, in bytes.
fn taken(memory: &GuestMemory) -> u64 {
    let region = memory.iter().next().expect("a region");
    let file = region.file_offset().expect("a file");
    fstat(file.file()).expect("its size").st_blocks.cast_unsigned() * 512
}

/// Guest memory that is all in use.
fn full(mib: u64) -> GuestMemory {
    let memory = crate::memory::allocate(mib).expect("memory");
    for page in 0..mib * MIB / PAGE {
        memory.write_obj(1u8, GuestAddress(page * PAGE)).expect("written");
    }
    memory
}

/// A byte of guest memory, from its file: a look at the memory itself would make a page.
fn byte(memory: &GuestMemory, address: u64) -> u8 {
    let region = memory.find_region(GuestAddress(address)).expect("a region");
    let file = region.file_offset().expect("a file");
    let offset = file.start() + address - region.start_addr().0;
    let mut byte = [0];
    rustix::io::pread(file.file(), &mut byte, offset).expect("read");
    byte[0]
}

#[test]
fn reported_memory_goes_back_to_the_host() {
    let memory = full(8);
    let before = taken(&memory);
    assert_eq!(before, 8 * MIB);
    let ranges = [(2 * MIB, MIB as u32, true), (5 * MIB, 2 * MIB as u32, true)];
    assert!(serve(&memory, 2, &ranges).expect("served").contains(2));
    assert_eq!(taken(&memory), 5 * MIB);
    for (address, expected) in [
        (2 * MIB - PAGE, 1),
        (2 * MIB, 0),
        (3 * MIB - PAGE, 0),
        (3 * MIB, 1),
        (5 * MIB, 0),
        (7 * MIB, 1),
    ] {
        assert_eq!(byte(&memory, address), expected, "{address:#x}");
    }
    memory.write_obj(2u8, GuestAddress(2 * MIB)).expect("it is there again");
    assert_eq!((byte(&memory, 2 * MIB), taken(&memory)), (2, 5 * MIB + PAGE));
}

#[test]
fn pages_that_are_reported_in_part_stay() {
    let memory = full(1);
    let base = 0x8_0000;
    serve(&memory, 2, &[(base + 1, 2 * PAGE as u32, true)]).expect("served");
    let pages = [0, 1, 2].map(|page| byte(&memory, base + page * PAGE));
    assert_eq!(pages, [1, 0, 1]);
    for range in [(base + 4 * PAGE + 1, PAGE as u32, true), (base + 4 * PAGE, 0, true)] {
        serve(&memory, 2, &[range]).expect("served");
    }
    assert_eq!(byte(&memory, base + 4 * PAGE), 1);
    assert_eq!(taken(&memory), MIB - PAGE);
}

#[test]
fn reports_of_what_is_no_memory_break_the_queue() {
    for range in [
        (2 * MIB, PAGE as u32, true),
        (2 * MIB - PAGE, 2 * PAGE as u32, true),
        (u64::MAX - PAGE, u32::MAX, true),
        (0, u32::MAX, true),
    ] {
        let memory = full(2);
        let error = serve(&memory, 2, &[range]).expect_err("refused");
        assert!(matches!(error, DeviceError::Queue { queue: 2, .. }), "{error}");
        assert_eq!(taken(&memory), 2 * MIB);
    }
}

#[test]
fn ranges_on_both_sides_of_the_hole_are_not_one() {
    use crate::memory::{HOLE_END, HOLE_START};

    let memory = crate::memory::allocate((HOLE_START / MIB) + 2).expect("memory");
    for address in [HOLE_START - PAGE, HOLE_END, HOLE_END + PAGE] {
        memory.write_obj(1u8, GuestAddress(address)).expect("written");
    }
    assert!(serve(&memory, 2, &[(HOLE_START - PAGE, u32::MAX, true)]).is_err());
    serve(&memory, 2, &[(HOLE_END, PAGE as u32, true)]).expect("served");
    let bytes = [HOLE_START - PAGE, HOLE_END, HOLE_END + PAGE].map(|at| byte(&memory, at));
    assert_eq!(bytes, [1, 0, 1]);
}

#[test]
fn what_is_put_into_the_balloon_is_used_up_unread() {
    let memory = full(1);
    for queue in [0, 1] {
        assert!(
            serve(&memory, queue, &[(u64::MAX - 3, 4, false)]).expect("served").contains(queue)
        );
    }
    assert_eq!(taken(&memory), MIB);
    let mut config = [0xff; 24];
    Balloon::new().read_config(0, &mut config);
    assert_eq!(config, [0; 24]);
}
