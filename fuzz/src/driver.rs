//! A driver that keeps to no rule, and the memory that it shares with a device.
//!
//! The device may write to the buffers that the driver made writable and to its used rings, and
//! nowhere else: that is checked at the end, as long as the driver has told the device of its buffers
//! in the usual way, so that they are known here.

use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

use kiln_vmm::GuestMemory;
use kiln_vmm::virtio::{Event, Queues, VirtioDevice};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, FileOffset, GuestAddress};

use crate::input::Input;

/// Memory in bytes. The rings lie in its first half, buffers in the second, and two regions meet in
/// the middle of those.
pub const MEMORY: usize = 0x2_0000;
const BUFFERS: usize = MEMORY / 2;
const SEAM: usize = BUFFERS + BUFFERS / 2;

/// Entries of each queue, and the distance of their bases.
const SIZE: u16 = 16;
const SPACING: usize = 0x2000;
const AVAILABLE: usize = 0x800;
const USED: usize = 0x1000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The most steps of a script.
const STEPS: usize = 64;
/// The most bytes that a script puts into one buffer.
const CONTENT: usize = 128;

/// What the host's side of a device does, as a script says.
pub type Host<'h> = dyn FnMut(&mut Input<'_>) + 'h;

/// A driver of one device.
pub struct Driver<'d> {
    device: &'d mut dyn VirtioDevice,
    memory: GuestMemory,
    queues: Vec<Queue>,
    offered: Vec<u16>,
    descriptors: Vec<u16>,
    /// Memory as the driver has written it.
    written: Vec<u8>,
    /// Where the device may write.
    writable: Vec<Range<usize>>,
    /// Whether that is all there is: nothing was told to the device in another way.
    tracked: bool,
}

/// Memory with a seam in it, of a file as that of machines is.
pub fn memory() -> GuestMemory {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("memory", flags).expect("a file"));
    file.set_len(MEMORY as u64).expect("sized");
    let file = Arc::new(file);
    let range = |start: usize, end: usize| {
        let offset = FileOffset::from_arc(Arc::clone(&file), start as u64);
        (GuestAddress(start as u64), end - start, Some(offset))
    };
    let ranges = [range(0, SEAM), range(SEAM, MEMORY)];
    GuestMemory::from_ranges_with_files(ranges).expect("memory")
}

impl<'d> Driver<'d> {
    /// A driver of a device that has not been used.
    pub fn new(device: &'d mut dyn VirtioDevice) -> Self {
        let count = device.queue_max_sizes().len();
        let mut driver = Self {
            device,
            memory: memory(),
            queues: Vec::new(),
            offered: vec![0; count],
            descriptors: vec![0; count],
            written: vec![0; MEMORY],
            writable: Vec::new(),
            tracked: true,
        };
        driver.device.ack_features(driver.device.features());
        for index in 0..count {
            let base = index * SPACING;
            let mut queue = Queue::new(SIZE).expect("a size");
            let at = |offset: usize| GuestAddress((base + offset) as u64);
            queue.try_set_desc_table_address(at(0)).expect("aligned");
            queue.try_set_avail_ring_address(at(AVAILABLE)).expect("aligned");
            queue.try_set_used_ring_address(at(USED)).expect("aligned");
            queue.set_ready(true);
            driver.queues.push(queue);
            driver.writable.push(base + USED..base + USED + 6 + 8 * usize::from(SIZE));
        }
        driver
    }

    /// Plays a script; `host` does the host's part of it.
    pub fn play(mut self, script: &[u8], host: &mut Host<'_>) {
        let mut input = Input::new(script);
        let mut works = true;
        for _ in 0..STEPS {
            if input.is_empty() || !works {
                break;
            }
            let queue = input.below(self.queues.len());
            match input.u8() % 12 {
                0..=4 => self.offer(queue, &mut input),
                5 => self.scribble(&mut input),
                6 | 7 => works = self.process(Event::Queue(queue as u16)),
                8 => works = self.process(Event::Host),
                9 | 10 => host(&mut input),
                _ => {
                    let mut data = [0; 8];
                    let (offset, length) = (input.u64(), input.below(9));
                    self.device.read_config(offset, &mut data[..length]);
                    self.device.write_config(offset, input.bytes(length));
                }
            }
        }
        for queue in 0..self.queues.len() {
            works = works && self.process(Event::Queue(queue as u16));
        }
        if works {
            self.process(Event::Host);
        }
        if self.tracked {
            self.check();
        }
        self.device.reset();
    }

    /// Whether the device goes on.
    fn process(&mut self, event: Event) -> bool {
        let mut queues: Vec<&mut Queue> = self.queues.iter_mut().collect();
        let mut queues = Queues { memory: &self.memory, queues: &mut queues };
        self.device.process(event, &mut queues).is_ok()
    }

    /// Makes a chain available.
    fn offer(&mut self, queue: usize, input: &mut Input<'_>) {
        let base = queue * SPACING;
        let count = 1 + input.below(5);
        let head = self.descriptors[queue] % SIZE;
        for number in 1..=count {
            let kind = input.u8();
            let address = match kind & 7 {
                0 => input.u64(),
                1 => MEMORY as u64 - u64::from(input.u8()),
                2 => SEAM as u64 - u64::from(input.u8()),
                _ => BUFFERS as u64 + u64::from(input.u16()),
            };
            let length = match kind >> 3 & 3 {
                0 => input.u32(),
                1 => u32::from(input.u16()),
                _ => u32::from(input.u8()),
            };
            // A buffer on the rings changes what the device is told.
            self.tracked &= address >= BUFFERS as u64;
            let mut flags = if number < count { NEXT } else { 0 };
            if kind & 0x20 != 0 {
                flags |= WRITE;
                self.allow(address, length);
            } else {
                let content = input.bytes(CONTENT.min(length as usize));
                self.write(address, content);
            }
            if kind & 0xc0 == 0xc0 {
                flags |= INDIRECT;
                self.tracked = false;
            }
            let slot = self.descriptors[queue] % SIZE;
            self.descriptors[queue] = self.descriptors[queue].wrapping_add(1);
            let next = self.descriptors[queue] % SIZE;
            let at = (base + 16 * usize::from(slot)) as u64;
            self.write(at, &address.to_le_bytes());
            self.write(at + 8, &length.to_le_bytes());
            self.write(at + 12, &flags.to_le_bytes());
            self.write(at + 14, &next.to_le_bytes());
        }
        let slot = self.offered[queue] % SIZE;
        self.offered[queue] = self.offered[queue].wrapping_add(1);
        let ring = (base + AVAILABLE) as u64;
        self.write(ring + 4 + 2 * u64::from(slot), &head.to_le_bytes());
        self.write(ring + 2, &self.offered[queue].to_le_bytes());
    }

    /// Writes anything anywhere into the rings.
    fn scribble(&mut self, input: &mut Input<'_>) {
        let address = usize::from(input.u16()) % (self.queues.len() * SPACING);
        let count = input.below(32);
        self.write(address as u64, input.bytes(count));
        self.tracked = false;
    }

    /// The driver's own write, as far as it is to memory.
    fn write(&mut self, address: u64, bytes: &[u8]) {
        let Some(start) = usize::try_from(address).ok().filter(|start| *start < MEMORY) else {
            return;
        };
        let bytes = &bytes[..bytes.len().min(MEMORY - start)];
        self.memory.write_slice(bytes, GuestAddress(address)).expect("in memory");
        self.written[start..start + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, address: u64, length: u32) {
        let start = usize::try_from(address).unwrap_or(usize::MAX).min(MEMORY);
        let end = start.saturating_add(length as usize).min(MEMORY);
        self.writable.push(start..end);
    }

    fn check(&self) {
        let mut now = vec![0; MEMORY];
        self.memory.read_slice(&mut now, GuestAddress(0)).expect("in memory");
        let mut at = 0;
        while let Some(offset) = differs(&now[at..], &self.written[at..]) {
            at += offset;
            let allowed = self.writable.iter().find(|range| range.contains(&at));
            let range = allowed.unwrap_or_else(|| panic!("{at:#x} was written, no buffer's"));
            at = range.end;
        }
    }
}

/// Where two slices of one length first differ.
fn differs(one: &[u8], other: &[u8]) -> Option<usize> {
    const PIECE: usize = 256;
    let pieces = one.chunks(PIECE).zip(other.chunks(PIECE));
    let (index, (one, other)) = pieces.enumerate().find(|(_, (one, other))| one != other)?;
    let within = one.iter().zip(other).position(|(one, other)| one != other)?;
    Some(index * PIECE + within)
}
