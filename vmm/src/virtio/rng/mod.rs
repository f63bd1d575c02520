//! virtio-rng (virtio 1.2, section 5.4): the host's random numbers for the guest.
//!
//! A request gets at most [`REQUEST_LIMIT`] bytes, whatever its length, so that no request keeps
//! the device's thread long; a driver asks again for more, as the specification has it.

use std::io::Write;

use virtio_queue::{QueueOwnedT, QueueT};

use super::{DeviceError, Event, Queues, Used, VirtioDevice, read_config_bytes};

/// The most bytes that a request gets.
pub const REQUEST_LIMIT: usize = 4096;

const DEVICE_TYPE: u32 = 4;
const REQUESTS: u16 = 0;
const QUEUE_SIZES: [u16; 1] = [64];

/// An entropy device.
#[derive(Debug, Default)]
pub struct Rng(());

impl Rng {
    /// A device that hands out what the host's `getrandom` gives.
    pub fn new() -> Self {
        Self::default()
    }

    fn serve(queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        let memory = queues.memory;
        let broken = |e: virtio_queue::Error| queue_error(&e);
        let Some(queue) = queues.queues.get_mut(usize::from(REQUESTS)) else {
            return Ok(Used::NONE);
        };
        let mut used = Used::NONE;
        loop {
            queue.disable_notification(memory).map_err(broken)?;
            while let Some(chain) = queue.iter(memory).map_err(broken)?.next() {
                let head = chain.head_index();
                let mut writer = chain.writer(memory).map_err(broken)?;
                let mut bytes = [0; REQUEST_LIMIT];
                let wanted = writer.available_bytes().min(REQUEST_LIMIT);
                let count = random(&mut bytes[..wanted])?;
                writer.write_all(&bytes[..count]).map_err(|e| queue_error(&e))?;
                queue.add_used(memory, head, count as u32).map_err(broken)?;
                used.add(REQUESTS);
            }
            if !queue.enable_notification(memory).map_err(broken)? {
                return Ok(used);
            }
        }
    }
}

/// Fills as much of `bytes` as the host gives at once.
fn random(bytes: &mut [u8]) -> Result<usize, DeviceError> {
    loop {
        match rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => return Ok(count),
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => {
                return Err(DeviceError::Host { what: "get random numbers", source: e.into() });
            }
        }
    }
}

fn queue_error(error: &dyn std::error::Error) -> DeviceError {
    DeviceError::Queue { queue: REQUESTS, reason: error.to_string() }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[], offset, data);
    }

    fn process(&mut self, event: Event, queues: &mut Queues<'_, '_>) -> Result<Used, DeviceError> {
        match event {
            Event::Queue(REQUESTS) => Self::serve(queues),
            _ => Ok(Used::NONE),
        }
    }

    fn reset(&mut self) {}
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::virtio::ring::Ring;

    #[test]
    fn a_request_gets_random_bytes_and_no_more_than_the_limit() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut ring = Ring::new(&memory, 0x1000, 16);
        ring.offer(&[(0x2_0000, 64, true)]);
        ring.offer(&[(0x3_0000, 5000, true), (0x4_0000, 5000, true)]);
        let used = Rng::new().process(
            Event::Queue(REQUESTS),
            &mut Queues { memory: &memory, queues: &mut [&mut ring.queue] },
        );
        assert!(used.unwrap().contains(REQUESTS));
        assert_eq!(ring.used(), [(0, 64), (1, REQUEST_LIMIT as u32)]);
        let mut bytes = [0; 64];
        memory.read_slice(&mut bytes, GuestAddress(0x2_0000)).unwrap();
        assert_ne!(bytes, [0; 64]);
    }

    #[test]
    fn a_request_outside_of_memory_breaks_the_queue() {
        let memory = crate::memory::allocate(1).unwrap();
        let mut ring = Ring::new(&memory, 0x1000, 16);
        ring.offer(&[(0xfff_0000, 64, true)]);
        let result = Rng::new().process(
            Event::Queue(REQUESTS),
            &mut Queues { memory: &memory, queues: &mut [&mut ring.queue] },
        );
        assert!(matches!(result, Err(DeviceError::Queue { queue: REQUESTS, .. })));
    }
}
