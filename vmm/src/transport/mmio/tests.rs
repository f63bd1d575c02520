//! A real device behind a real window, driven by register accesses.

mod driver;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use proptest::prelude::*;
use virtio_queue::QueueT;
use vmm_sys_util::eventfd::EventFd;

use super::*;
use crate::jail::seccomp::threads::Thread;
use crate::transport::ActivateError;
use crate::virtio::ring::Ring;
use crate::virtio::rng::Rng;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice};
use driver::Driver;

const VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;

fn memory() -> GuestMemory {
    crate::memory::allocate(1).unwrap()
}

fn worker() -> Worker {
    let (worker, _) = unstarted_worker();
    worker.start().unwrap();
    worker
}

fn window(device: impl VirtioDevice + 'static, thread: &Worker, memory: &GuestMemory) -> Driver {
    let backend = LocalBackend::new(Box::new(device), thread.handle());
    Driver::new(Box::new(backend), memory.clone())
}

#[test]
fn a_device_says_what_it_is() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    assert_eq!(driver.read(Register::MagicValue), 0x7472_6976);
    assert_eq!(driver.read(Register::Version), 2);
    assert_eq!(driver.read(Register::DeviceId), 4);
    assert_eq!(driver.read(Register::QueueNumMax), 64);
    driver.write(Register::QueueSel, 1);
    assert_eq!(driver.read(Register::QueueNumMax), 0);
    assert_eq!(driver.read(Register::ShmLenLow), u32::MAX);
}

#[test]
fn a_request_is_answered_with_an_interrupt() {
    let thread = worker();
    let memory = memory();
    let driver = &mut window(Rng::new(), &thread, &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    ring.offer(&[(0x2_0000, 32, true)]);
    driver.initialise(VERSION_1);
    driver.set_up_queue(0, 16, ring.addresses());
    assert_eq!(driver.read(Register::QueueReady), 1);
    assert!(!driver.is_connected(), "nothing uses it yet");
    driver.add_status(device_status::DRIVER_OK);
    assert!(driver.is_connected());
    // Made available before anybody watched, and served without a doorbell.
    driver.wait_for_interrupt();
    assert_eq!(ring.used(), [(0, 32)]);
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_USED);
    driver.write(Register::InterruptAck, INTERRUPT_USED);
    assert_eq!(driver.read(Register::InterruptStatus), 0);

    ring.offer(&[(0x2_0000, 16, true)]);
    driver.write(Register::QueueNotify, 0);
    driver.wait_for_interrupt();
    assert_eq!(ring.used(), [(0, 32), (1, 16)]);
}

fn unstarted_worker() -> (Worker, Arc<EventFd>) {
    let wanted = Arc::new(EventFd::new(0).unwrap());
    (Worker::new(Thread::Streams, wanted.clone()), wanted)
}

#[test]
fn the_first_use_of_a_device_waits_for_its_thread() {
    let (worker, wanted) = unstarted_worker();
    let memory = memory();
    let mut driver = window(Rng::new(), &worker, &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    ring.offer(&[(0x2_0000, 32, true)]);
    let addresses = ring.addresses();
    assert_eq!(driver.read(Register::DeviceId), 4);
    assert!(!worker.is_wanted(), "who only looks doesn't need it");
    let guest = std::thread::spawn(move || {
        driver.initialise(VERSION_1);
        driver.set_up_queue(0, 16, addresses);
        driver.add_status(device_status::DRIVER_OK);
        driver.wait_for_interrupt();
    });
    wanted.read().unwrap();
    assert!(worker.is_wanted() && !guest.is_finished());
    worker.start().unwrap();
    guest.join().unwrap();
    assert!(!worker.is_wanted());
    assert_eq!(ring.used(), [(0, 32)]);
}

#[test]
fn who_waits_for_a_thread_that_never_starts_is_let_go() {
    let (worker, wanted) = unstarted_worker();
    let memory = memory();
    let mut driver = window(Rng::new(), &worker, &memory);
    let addresses = Ring::new(&memory, 0x1000, 16).addresses();
    let guest = std::thread::spawn(move || {
        driver.initialise(VERSION_1);
        driver.set_up_queue(0, 16, addresses);
        driver.add_status(device_status::DRIVER_OK);
        driver.read(Register::Status)
    });
    wanted.read().unwrap();
    worker.refuse();
    assert_ne!(guest.join().unwrap() & device_status::NEEDS_RESET, 0);
}

#[test]
fn a_reset_device_starts_over() {
    let thread = worker();
    let memory = memory();
    let driver = &mut window(Rng::new(), &thread, &memory);
    for _ in 0..3 {
        memory_is_cleared(&memory);
        let mut ring = Ring::new(&memory, 0x1000, 16);
        ring.offer(&[(0x2_0000, 8, true)]);
        driver.initialise(VERSION_1 | EVENT_IDX);
        driver.set_up_queue(0, 16, ring.addresses());
        driver.add_status(device_status::DRIVER_OK);
        driver.wait_for_interrupt();
        assert_eq!(ring.used(), [(0, 8)]);
        driver.write(Register::Status, 0);
        assert_eq!(driver.read(Register::Status), 0);
        assert_eq!(driver.read(Register::QueueReady), 0);
    }
}

fn memory_is_cleared(memory: &GuestMemory) {
    use vm_memory::Bytes;
    memory.write_slice(&[0; 0x4000], vm_memory::GuestAddress(0x1000)).unwrap();
}

#[test]
fn features_are_negotiated_by_the_rules() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    assert_eq!(driver.offered_features() & EVENT_IDX, EVENT_IDX);
    // None at all, one without VERSION_1, one that was not offered.
    for features in [0, EVENT_IDX, VERSION_1 | 1 << 5, VERSION_1 | 1 << 33] {
        driver.initialise(features);
        let status = driver.read(Register::Status);
        assert_eq!(status & device_status::FEATURES_OK, 0, "{features:#x}");
        driver.add_status(device_status::DRIVER_OK);
        assert_eq!(driver.read(Register::Status) & device_status::DRIVER_OK, 0);
    }
    driver.initialise(VERSION_1);
    driver.write(Register::DriverFeatures, u32::MAX);
    assert_eq!(driver.0.driver_features, VERSION_1, "fixed once negotiated");
}

#[test]
fn status_bits_come_in_order_and_only_a_reset_clears_them() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    driver.write(Register::Status, device_status::DRIVER);
    assert_eq!(driver.read(Register::Status), 0);
    driver.write(Register::Status, device_status::ACKNOWLEDGE);
    driver.write(Register::Status, device_status::ACKNOWLEDGE | device_status::DRIVER);
    driver.write(Register::Status, device_status::DRIVER);
    assert_eq!(driver.read(Register::Status), 3);
    driver.write(Register::Status, 3 | device_status::FAILED | device_status::NEEDS_RESET);
    assert_eq!(driver.read(Register::Status), 3 | device_status::FAILED);
}

#[test]
fn queues_that_are_none_are_refused() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    let good = [0x1000, 0x2000, 0x3000];
    let end = 1 << 20;
    let bad: [(u32, [u64; 3]); 9] = [
        (0, good),
        (3, good),
        (128, good),
        (u32::MAX, good),
        (16, [0x1008, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, end - 128]),
        (16, [!0xf, 0x2000, 0x3000]),
        (16, [0x1000, crate::memory::HOLE_START, 0x3000]),
    ];
    for (size, addresses) in bad {
        driver.initialise(VERSION_1);
        driver.set_up_queue(0, size, addresses);
        assert_eq!(driver.read(Register::QueueReady), 0, "{size} {addresses:x?}");
    }
    // The last bytes of memory are memory.
    driver.initialise(VERSION_1);
    driver.set_up_queue(0, 16, [0x1000, 0x2000, end - 136]);
    assert_eq!(driver.read(Register::QueueReady), 1);
}

#[test]
fn a_queue_is_set_up_between_negotiation_and_use_only() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    driver.write(Register::QueueSel, 0);
    driver.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    assert_eq!(driver.read(Register::QueueReady), 0);
    driver.initialise(VERSION_1);
    driver.set_up_queue(0, 16, [0x1000, 0x2000, 0x3000]);
    driver.write(Register::QueueDescLow, 0x5000);
    assert_eq!(driver.0.queues[0].descriptors, 0x1000, "fixed once ready");
    driver.write(Register::QueueReady, 0);
    assert_eq!(driver.read(Register::QueueReady), 0);
}

/// A device that is slow, and says when it is at work.
struct Slow {
    at_work: mpsc::Sender<()>,
    go_on: mpsc::Receiver<()>,
    resets: mpsc::Sender<()>,
}

impl VirtioDevice for Slow {
    fn device_type(&self) -> u32 {
        42
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[16]
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(7);
    }

    fn process(&mut self, _: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        self.at_work.send(()).unwrap();
        self.go_on.recv().unwrap();
        let mut used = Used::NONE;
        while let Some(chain) = queues.queues[0].pop_descriptor_chain(queues.memory) {
            queues.queues[0].add_used(queues.memory, chain.head_index(), 0).unwrap();
            used.add(0);
        }
        Ok(used)
    }

    fn reset(&mut self) {
        self.resets.send(()).unwrap();
    }
}

#[test]
fn a_reset_in_mid_flight_waits_for_the_device() {
    let thread = worker();
    let memory = memory();
    let (at_work, is_at_work) = mpsc::channel();
    let (let_go_on, go_on) = mpsc::channel();
    let (resets, was_reset) = mpsc::channel();
    let mut driver = window(Slow { at_work, go_on, resets }, &thread, &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    ring.offer(&[(0x2_0000, 8, true)]);
    driver.initialise(VERSION_1);
    driver.set_up_queue(0, 16, ring.addresses());
    driver.add_status(device_status::DRIVER_OK);
    is_at_work.recv().unwrap();
    let resetting = std::thread::spawn(move || {
        driver.write(Register::Status, 0);
        driver
    });
    assert!(was_reset.recv_timeout(Duration::from_millis(50)).is_err(), "it is still at work");
    assert!(!resetting.is_finished());
    let_go_on.send(()).unwrap();
    let mut driver = resetting.join().unwrap();
    was_reset.recv().unwrap();
    assert_eq!(driver.read(Register::Status), 0);
    assert_eq!(ring.used_count(), 1, "what it was at is done, and nothing after it");
}

#[test]
fn a_broken_driver_is_told_to_reset_and_can() {
    let thread = worker();
    let memory = memory();
    let driver = &mut window(Rng::new(), &thread, &memory);
    let mut ring = Ring::new(&memory, 0x1000, 16);
    ring.offer(&[(0x1000_0000, 8, true)]);
    driver.initialise(VERSION_1);
    driver.set_up_queue(0, 16, ring.addresses());
    driver.add_status(device_status::DRIVER_OK);
    driver.wait_for_interrupt();
    assert_eq!(driver.read(Register::InterruptStatus), INTERRUPT_CONFIG);
    let needs_reset = device_status::NEEDS_RESET;
    assert_eq!(driver.read(Register::Status) & needs_reset, needs_reset);
    driver.write(Register::QueueNotify, 0);
    driver.write(Register::Status, 0);
    assert_eq!(driver.read(Register::Status), 0);
    assert_eq!(ring.used_count(), 0);
}

/// A backend that another process serves and that can't be reached.
struct Unreachable;

impl Backend for Unreachable {
    fn device_type(&self) -> u32 {
        26
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[8]
    }

    fn features(&self) -> u64 {
        VERSION_1
    }

    fn read_config(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn is_remote(&self) -> bool {
        true
    }

    fn activate(&mut self, _: Activation) -> Result<(), ActivateError> {
        Err(ActivateError::Peer("gone".into()))
    }

    fn reset(&mut self) {}
}

#[test]
fn a_backend_that_fails_to_start_needs_a_reset() {
    let mut driver = Driver::new(Box::new(Unreachable), memory());
    assert_eq!(driver.read(Register::InterruptStatus), 0);
    driver.initialise(VERSION_1);
    driver.add_status(device_status::DRIVER_OK);
    driver.wait_for_interrupt();
    let needs_reset = device_status::NEEDS_RESET;
    assert_eq!(driver.read(Register::Status) & needs_reset, needs_reset);
    let both = INTERRUPT_USED | INTERRUPT_CONFIG;
    assert_eq!(driver.read(Register::InterruptStatus), both, "used buffers can't be ruled out");
}

#[test]
fn the_configuration_is_read_at_any_width_and_its_generation_follows_writes() {
    let thread = worker();
    let (sender, receiver) = (mpsc::channel().0, mpsc::channel().1);
    let device = Slow { at_work: sender.clone(), go_on: receiver, resets: sender };
    let driver = &mut window(device, &thread, &memory());
    for width in [1, 2, 4, 8] {
        let mut data = vec![0; width];
        driver.0.read(CONFIGURATION + 3, &mut data);
        assert_eq!(data, vec![7; width]);
    }
    let before = driver.read(Register::ConfigGeneration);
    driver.0.write(CONFIGURATION, &[1]);
    assert_ne!(driver.read(Register::ConfigGeneration), before);
}

#[test]
fn registers_have_one_width() {
    let thread = worker();
    let driver = &mut window(Rng::new(), &thread, &memory());
    let mut data = [0xff; 8];
    driver.0.read(0, &mut data);
    assert_eq!(data, [0; 8]);
    driver.0.write(Register::Status as u64, &[1]);
    assert_eq!(driver.read(Register::Status), 0);
}

#[derive(Debug, Clone)]
enum Access {
    Read(u64, usize),
    Write(u64, Vec<u8>),
}

fn accesses() -> impl Strategy<Value = Access> {
    let registers = prop_oneof![
        4 => (0u64..0x40).prop_map(|register| register * 4),
        1 => 0u64..0x1000,
    ];
    let widths = prop_oneof![8 => Just(4usize), 1 => prop::sample::select(vec![1usize, 2, 8])];
    let values = prop_oneof![
        prop::sample::select(vec![0u64, 1, 3, 7, 0xb, 0xf, 16, 0x1000, 0x2000, 0xd000_0000]),
        any::<u64>(),
    ];
    (registers, widths, values, any::<bool>()).prop_map(|(offset, width, value, write)| {
        if write {
            Access::Write(offset, value.to_le_bytes()[..width].to_vec())
        } else {
            Access::Read(offset, width)
        }
    })
}

proptest! {
    #[test]
    fn no_register_access_does_harm(accesses in prop::collection::vec(accesses(), 0..200)) {
        let thread = worker();
        let driver = &mut window(Rng::new(), &thread, &memory());
        for access in accesses {
            match access {
                Access::Read(offset, width) => driver.0.read(offset, &mut vec![0; width]),
                Access::Write(offset, data) => driver.0.write(offset, &data),
            }
        }
        driver.write(Register::Status, 0);
        driver.initialise(VERSION_1);
        prop_assert_eq!(driver.read(Register::Status), 0xb);
    }
}
