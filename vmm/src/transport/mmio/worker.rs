//! The thread that serves devices of this process: an event loop that waits for doorbells and for
//! what the host has for the devices.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use event_manager::{
    Error, EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint,
    SubscriberId,
};
use virtio_queue::{Queue, QueueT};

use crate::sync::lock;
use crate::transport::Activation;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice};

/// An event loop for any number of devices; [`Worker::run`] is its thread's whole work.
pub struct Worker {
    events: EventManager<Served>,
    stop: Arc<AtomicBool>,
}

/// Talks to a [`Worker`] from other threads.
#[derive(Clone)]
pub struct WorkerHandle {
    endpoint: RemoteEndpoint<Served>,
    stop: Arc<AtomicBool>,
}

impl Worker {
    /// Makes an event loop.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new() -> std::io::Result<Self> {
        let events = EventManager::new().map_err(std::io::Error::other)?;
        Ok(Self { events, stop: Arc::default() })
    }

    /// What other threads talk to it with.
    pub fn handle(&self) -> WorkerHandle {
        WorkerHandle { endpoint: self.events.remote_endpoint(), stop: self.stop.clone() }
    }

    /// Serves devices until [`WorkerHandle::stop`].
    pub fn run(mut self) {
        while !self.stop.load(Ordering::SeqCst) {
            match self.events.run() {
                Ok(_) => {}
                Err(Error::Epoll(e)) if e.errno() == libc::EINTR => {}
                Err(e) => {
                    tracing::error!("device thread: {e}");
                    return;
                }
            }
        }
    }
}

impl WorkerHandle {
    /// Makes [`Worker::run`] return when it has served what it is at.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        // The only failure is a counter at its limit, which wakes just as well.
        let _ = self.endpoint.kick();
    }

    /// Begins to serve a device.
    pub(super) fn serve(&self, served: Served) -> Result<SubscriberId, std::io::Error> {
        self.endpoint
            .call_blocking(|events| {
                let id = events.add_subscriber(served);
                match events.subscriber_mut(id)?.failed.take() {
                    None => Ok(id),
                    Some(e) => {
                        events.remove_subscriber(id)?;
                        Err(e)
                    }
                }
            })
            .map_err(|e: Error| std::io::Error::other(e))
    }

    /// Stops serving it. When this returns the thread has let go of queues and memory.
    pub(super) fn release(&self, id: SubscriberId) {
        let released = self.endpoint.call_blocking(move |events| {
            events.remove_subscriber(id)?;
            Ok::<(), Error>(())
        });
        if let Err(e) = released {
            tracing::error!("device thread: {e}");
        }
    }
}

/// An activated device.
pub(super) struct Served {
    device: Arc<Mutex<Box<dyn VirtioDevice>>>,
    activation: Activation,
    broken: bool,
    /// Why it could not be watched.
    failed: Option<Error>,
}

/// The event data of [`VirtioDevice::host_events`]; doorbells have their queue's index.
const HOST: u32 = u32::MAX;

impl Served {
    pub fn new(device: Arc<Mutex<Box<dyn VirtioDevice>>>, activation: Activation) -> Self {
        Self { device, activation, broken: false, failed: None }
    }

    /// What is watched for it.
    fn watched(&self) -> Vec<Events> {
        let ready = self.activation.queues.iter().map(QueueT::ready);
        let doorbells = self.activation.doorbells.iter().zip(ready).enumerate();
        let mut events: Vec<_> = doorbells
            .filter(|(_, (_, ready))| *ready)
            .map(|(index, (bell, _))| Events::with_data(bell, index as u32, EventSet::IN))
            .collect();
        if let Some(fd) = lock(&self.device).host_events() {
            events.push(Events::with_data_raw(fd.as_raw_fd(), HOST, EventSet::IN));
        }
        events
    }

    fn serve(&mut self, event: Event) -> Result<(), DeviceError> {
        let Activation { memory, queues, interrupt, .. } = &mut self.activation;
        let mut references: Vec<&mut Queue> = queues.iter_mut().collect();
        let used =
            lock(&self.device).process(event, &mut Queues { memory, queues: &mut references })?;
        if used == Used::NONE {
            return Ok(());
        }
        for (index, queue) in (0u16..).zip(queues.iter_mut()) {
            if used.contains(index) && needs_notification(queue, index, memory)? {
                interrupt.used();
                break;
            }
        }
        Ok(())
    }

    /// Looks at nothing any more, so that a device that is broken costs nothing.
    fn stop_watching(&self, events: &mut EventOps<'_>) {
        for watched in self.watched() {
            // One that was not being watched is all right.
            let _ = events.remove(watched);
        }
    }
}

fn needs_notification(
    queue: &mut Queue,
    index: u16,
    memory: &crate::GuestMemory,
) -> Result<bool, DeviceError> {
    queue
        .needs_notification(memory)
        .map_err(|e| DeviceError::Queue { queue: index, reason: e.to_string() })
}

impl MutEventSubscriber for Served {
    fn init(&mut self, events: &mut EventOps<'_>) {
        for watched in self.watched() {
            if let Err(e) = events.add(watched) {
                self.failed = Some(e);
                return;
            }
        }
        // What was made available before anybody watched rang no bell that was heard.
        for (doorbell, queue) in self.activation.doorbells.iter().zip(&self.activation.queues) {
            if queue.ready() {
                // The only failure is a counter at its limit, which wakes just as well.
                let _ = doorbell.write(1);
            }
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps<'_>) {
        if self.broken {
            return;
        }
        let event = match events.data() {
            HOST => Event::Host,
            index => {
                if let Some(doorbell) = self.activation.doorbells.get(index as usize) {
                    // Not readable after all: somebody else has read it.
                    let _ = doorbell.read();
                }
                Event::Queue(index as u16)
            }
        };
        if let Err(e) = self.serve(event) {
            let kind = lock(&self.device).device_type();
            tracing::error!(device = kind, "virtio device stopped until it is reset: {e}");
            self.broken = true;
            self.stop_watching(ops);
            self.activation.interrupt.demand_reset();
        }
    }
}
