//! The device against a driver that the tests play.

use std::fs::File;
use std::io::{Read, Write};
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use rustix::event::{PollFd, PollFlags, poll};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_RO, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID,
    VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::config::DiskLimits;
use crate::virtio::chains::{check, hostile_queue};
use crate::virtio::ring::Ring;
use crate::virtio::{DeviceError, Event, Queues, VirtioDevice};

const SECTORS: u64 = 64;
const HEADER: u64 = 0x10_000;
const DATA: u64 = 0x11_000;
const STATUS: u64 = 0x3f_000;

const OK: u32 = VIRTIO_BLK_S_OK;
const ERROR: u32 = VIRTIO_BLK_S_IOERR;
const UNSUPPORTED: u32 = VIRTIO_BLK_S_UNSUPP;

struct Driver {
    device: Block,
    memory: GuestMemory,
    file: File,
}

fn content() -> Vec<u8> {
    (0..SECTORS * 512 + 100).map(|at| (at / 3) as u8).collect()
}

impl Driver {
    fn new(read_only: bool) -> Self {
        let mut file = tempfile::NamedTempFile::new().expect("file");
        file.write_all(&content()).expect("writes");
        let opened = File::options().read(true).write(!read_only).open(file.path()).expect("opens");
        let device = Block::new(opened, read_only, "serial").expect("disk");
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_000)]).expect("memory");
        Self { device, memory, file: file.into_file() }
    }

    /// Makes a request whose data buffers are `buffers`; returns status and used length.
    fn request(&mut self, kind: u32, sector: u64, buffers: &[(u64, u32, bool)]) -> (u32, u32) {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.memory.write_slice(&header, GuestAddress(HEADER)).expect("in memory");
        self.memory.write_obj(0xffu8, GuestAddress(STATUS)).expect("in memory");
        let chain = [&[(HEADER, 16, false)], buffers, &[(STATUS, 1, true)]].concat();
        let used = self.serve(&chain).expect("works");
        let status: u8 = self.memory.read_obj(GuestAddress(STATUS)).expect("in memory");
        (status.into(), used)
    }

    fn serve(&mut self, chain: &[(u64, u32, bool)]) -> Result<u32, DeviceError> {
        let mut ring = Ring::new(&self.memory, 0, 16);
        ring.offer(chain);
        let mut queues = [&mut ring.queue];
        let mut queues = Queues { memory: &self.memory, queues: &mut queues };
        let used = self.device.process(Event::Queue(0), &mut queues)?;
        assert!(used.contains(0));
        Ok(ring.used()[0].1)
    }

    /// A discard or write-zeroes request.
    fn clear(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u32 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
            })
            .collect();
        self.memory.write_slice(&bytes, GuestAddress(DATA)).expect("in memory");
        self.request(kind, 0, &[(DATA, bytes.len() as u32, false)]).0
    }

    fn disk(&self) -> Vec<u8> {
        let mut bytes = vec![0; (SECTORS * 512) as usize + 100];
        self.file.read_exact_at(&mut bytes, 0).expect("reads");
        bytes
    }
}

#[test]
fn reads_and_writes_are_where_they_should_be() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 3, &[(DATA, 512, true)]), (OK, 513));
    let mut data = [0; 512];
    driver.memory.read_slice(&mut data, GuestAddress(DATA)).expect("in memory");
    assert_eq!(data[..], content()[3 * 512..4 * 512]);

    let pieces = [(DATA, 1000, false), (DATA + 2000, 24, false)];
    driver.memory.write_slice(&[0xaa; 3000], GuestAddress(DATA)).expect("in memory");
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, SECTORS - 2, &pieces), (OK, 1));
    assert_eq!(driver.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    let mut expected = content();
    expected[62 * 512..64 * 512].fill(0xaa);
    assert!(driver.disk() == expected);
}

#[test]
fn a_request_may_be_cut_anywhere() {
    let mut driver = Driver::new(false);
    let header = [&VIRTIO_BLK_T_IN.to_le_bytes()[..], &[0; 12]].concat();
    driver.memory.write_slice(&header, GuestAddress(HEADER)).expect("in memory");
    let chain =
        [(HEADER, 3, false), (HEADER + 3, 13, false), (DATA, 500, true), (DATA + 500, 13, true)];
    assert_eq!(driver.serve(&chain).expect("works"), 513);
    let mut data = [0; 513];
    driver.memory.read_slice(&mut data, GuestAddress(DATA)).expect("in memory");
    assert_eq!(data[..512], content()[..512]);
    assert_eq!(u32::from(data[512]), OK);
}

#[test]
fn ranges_are_checked() {
    let mut driver = Driver::new(false);
    for (sector, length) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (u64::MAX, 512),
        (u64::MAX / 512, 512),
        (0, 511),
        (0, 513),
        (SECTORS, 100),
    ] {
        for (kind, write) in [(VIRTIO_BLK_T_IN, true), (VIRTIO_BLK_T_OUT, false)] {
            let (status, _) = driver.request(kind, sector, &[(DATA, length, write)]);
            assert_eq!(status, ERROR, "{length} at {sector}");
        }
    }
    assert!(driver.disk() == content(), "the odd end of the file is not touched either");
}

#[test]
fn a_read_only_disk_is_not_written() {
    let mut driver = Driver::new(true);
    assert_eq!(driver.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), (OK, 513));
    assert_eq!(driver.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]).0, ERROR);
    assert_eq!(driver.clear(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), ERROR);
    assert_eq!(driver.clear(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0)]), ERROR);
    assert!(driver.disk() == content());
    assert_ne!(driver.device.features() & (1 << VIRTIO_BLK_F_RO), 0);
    assert_eq!(driver.device.features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
}

#[test]
fn zeroes_are_written_and_discards_give_space_back() {
    let mut driver = Driver::new(false);
    let unmap = 1;
    assert_eq!(driver.clear(VIRTIO_BLK_T_WRITE_ZEROES, &[(1, 2, 0), (8, 8, unmap)]), OK);
    let mut expected = content();
    expected[512..3 * 512].fill(0);
    expected[8 * 512..16 * 512].fill(0);
    assert!(driver.disk() == expected);
    driver.file.sync_all().expect("syncs");
    let before = driver.file.metadata().expect("metadata").blocks();
    assert_eq!(driver.clear(VIRTIO_BLK_T_DISCARD, &[(16, 16, 0), (40, 0, 0)]), OK);
    expected[16 * 512..32 * 512].fill(0);
    assert!(driver.disk() == expected);
    assert!(driver.file.metadata().expect("metadata").blocks() < before);

    for (kind, ranges, status) in [
        (VIRTIO_BLK_T_DISCARD, &[(0, 1, 1)][..], UNSUPPORTED),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 2)], UNSUPPORTED),
        (VIRTIO_BLK_T_DISCARD, &[(SECTORS, 1, 0)], ERROR),
        (VIRTIO_BLK_T_DISCARD, &[(u64::MAX, 1, 0)], ERROR),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, u32::MAX, 0)], ERROR),
        (VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 1, 0), (SECTORS, 1, 0)], ERROR),
        (VIRTIO_BLK_T_DISCARD, &[(0, 1, 0); 65], ERROR),
        (VIRTIO_BLK_T_DISCARD, &[], ERROR),
    ] {
        assert_eq!(driver.clear(kind, ranges), status, "{ranges:?}");
    }
    let odd = driver.request(VIRTIO_BLK_T_DISCARD, 0, &[(DATA, 15, false)]);
    assert_eq!(odd.0, ERROR);
    assert!(driver.disk() == expected, "nothing of a refused request is carried out");
}

#[test]
fn zeroes_are_written_where_the_file_system_can_not_make_them() {
    let directory = std::path::Path::new("/dev/shm");
    let mut file = tempfile::tempfile_in(directory).expect("a tmpfs at /dev/shm");
    file.write_all(&[0xff; 300 << 10]).expect("writes");
    let disk = disk::Disk::new(file.try_clone().expect("clones"), false).expect("disk");
    disk.write_zeroes(1024, 200 << 10, false).expect("writes zeroes");
    let mut bytes = Vec::new();
    std::io::Seek::rewind(&mut file).expect("rewinds");
    file.read_to_end(&mut bytes).expect("reads");
    let end = 1024 + (200 << 10);
    assert!(bytes[..1024].iter().chain(&bytes[end..]).all(|byte| *byte == 0xff));
    assert!(bytes[1024..end].iter().all(|byte| *byte == 0));
}

#[test]
fn the_id_is_told_and_other_requests_are_not_supported() {
    let mut driver = Driver::new(false);
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), (OK, 21));
    let mut id = [0; 20];
    driver.memory.read_slice(&mut id, GuestAddress(DATA)).expect("in memory");
    assert_eq!(&id, b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(driver.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)]).0, ERROR);
    for kind in [2, 3, 14, 15, u32::MAX] {
        assert_eq!(driver.request(kind, 0, &[(DATA, 512, true)]).0, UNSUPPORTED);
    }
}

#[test]
fn a_request_that_can_not_be_answered_stops_the_device() {
    let mut driver = Driver::new(false);
    assert!(driver.serve(&[(HEADER, 16, false)]).is_err(), "no status byte");
    assert!(driver.serve(&[(HEADER, 16, true), (DATA, 1, false)]).is_err(), "order");
    assert!(driver.serve(&[(u64::MAX - 8, 16, false), (STATUS, 1, true)]).is_err(), "outside");
    driver.memory.write_obj(0xffu8, GuestAddress(STATUS)).expect("in memory");
    assert_eq!(driver.serve(&[(HEADER, 15, false), (STATUS, 1, true)]).expect("answers"), 1);
    let status: u8 = driver.memory.read_obj(GuestAddress(STATUS)).expect("in memory");
    assert_eq!(u32::from(status), ERROR, "a header that is cut short");
}

#[test]
fn only_files_and_block_devices_are_disks() {
    let (socket, _other) = std::os::unix::net::UnixStream::pair().expect("pair");
    let socket = File::from(std::os::fd::OwnedFd::from(socket));
    assert!(matches!(Block::new(socket, false, ""), Err(OpenError::Kind)));
    let directory = tempfile::tempdir().expect("directory");
    let opened = File::open(directory.path()).expect("opens");
    assert!(matches!(Block::new(opened, true, ""), Err(OpenError::Kind)));
    let file = tempfile::NamedTempFile::new().expect("file");
    let opened = File::open(file.path()).expect("opens");
    assert!(matches!(Block::new(opened, false, ""), Err(OpenError::Access { .. })));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn hostile_chains_are_survived(queue in hostile_queue(false), indirect in hostile_queue(true)) {
        let mut driver = Driver::new(false);
        check(&mut driver.device, &[queue], false);
        check(&mut driver.device, &[indirect], true);
        let length = driver.file.metadata().expect("metadata").len();
        prop_assert_eq!(length, SECTORS * 512 + 100, "the file never grows");
        prop_assert!(driver.disk()[(SECTORS * 512) as usize..] == content()[(SECTORS * 512) as usize..]);
    }
}

/// What is over the limit stays in the queue; what comes next is asked for at its time.
#[test]
fn requests_over_a_limit_wait_for_their_turn() {
    let mut driver = Driver::new(false);
    let limits = DiskLimits { requests_per_second: NonZeroU64::new(20), ..DiskLimits::default() };
    driver.device = driver.device.limited(limits).expect("a timer");
    let header = [&VIRTIO_BLK_T_IN.to_le_bytes()[..], &[0; 12]].concat();
    driver.memory.write_slice(&header, GuestAddress(HEADER)).expect("in memory");
    let mut ring = Ring::new(&driver.memory, 0, 16);
    let begin = Instant::now();
    (0..5).for_each(|_| {
        ring.offer(&[(HEADER, 16, false), (DATA, 512, true), (STATUS, 1, true)]);
    });
    let mut event = Event::Queue(0);
    while ring.used_count() < 5 {
        let mut queues = [&mut ring.queue];
        let mut queues = Queues { memory: &driver.memory, queues: &mut queues };
        let _ = driver.device.process(event, &mut queues).expect("works");
        let timer = driver.device.host_events().expect("a timer");
        poll(&mut [PollFd::new(&timer, PollFlags::IN)], None).expect("wakes");
        event = Event::Host;
    }
    // A twentieth of a second's worth is one.
    assert!(begin.elapsed() >= Duration::from_millis(3 * 50), "{:?}", begin.elapsed());
}

#[test]
fn zeroes_count_as_what_they_write() {
    let mut driver = Driver::new(false);
    let limits = DiskLimits { bytes_per_second: NonZeroU64::new(1 << 10), ..DiskLimits::default() };
    driver.device = driver.device.limited(limits).expect("a timer");
    assert_eq!(driver.clear(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, SECTORS as u32, 0)]), OK);
    // The next is served half a minute later.
    let mut ring = Ring::new(&driver.memory, 0, 16);
    ring.offer(&[(HEADER, 16, false), (STATUS, 1, true)]);
    let mut queues = [&mut ring.queue];
    let mut queues = Queues { memory: &driver.memory, queues: &mut queues };
    let used = driver.device.process(Event::Queue(0), &mut queues).expect("works");
    assert!(!used.contains(0));
}
