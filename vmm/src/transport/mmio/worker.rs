//! The thread that serves devices of this process: an event loop that waits for doorbells and for
//! what the host has for the devices.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;

use event_manager::{
    Error, EventManager, EventOps, EventSet, Events, MutEventSubscriber, RemoteEndpoint,
    SubscriberId,
};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::EventFd;

use crate::jail::seccomp::threads::{Thread, narrow};
use crate::log_limit::LogLimit;
use crate::sync::lock;
use crate::transport::Activation;
use crate::virtio::{DeviceError, Event, Queues, Used, VirtioDevice};

/// A thread for any number of devices. It ends when this is dropped.
///
/// Who uses the first of its devices waits until it is started: processors' threads, which do that, may
/// not start others.
pub struct Worker {
    shared: Arc<Shared>,
}

/// Gives a [`Worker`] devices to serve.
#[derive(Clone)]
pub struct WorkerHandle {
    shared: Arc<Shared>,
}

struct Shared {
    thread: Thread,
    /// Whether the thread has its list: before its first device it has nothing to do with the guest, and
    /// the start needn't wait for it.
    narrowed: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    /// Written to when the thread is wanted.
    wanted: Arc<EventFd>,
}

enum State {
    Unused,
    Wanted,
    Running(Running),
    /// It isn't started any more.
    Refused,
}

struct Running {
    endpoint: RemoteEndpoint<Served>,
    stop: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Worker {
    /// A worker for this kind of devices. `wanted` is written to when one of them is used for the first
    /// time: then somebody must [`start`](Self::start) it.
    pub fn new(thread: Thread, wanted: Arc<EventFd>) -> Self {
        Self {
            shared: Arc::new(Shared {
                thread,
                narrowed: AtomicBool::new(false),
                state: Mutex::new(State::Unused),
                changed: Condvar::new(),
                wanted,
            }),
        }
    }

    /// Whether somebody waits for its thread.
    pub fn is_wanted(&self) -> bool {
        matches!(*lock(&self.shared.state), State::Wanted)
    }

    /// Starts its thread, if it isn't running.
    ///
    /// # Errors
    /// The host is out of threads or file descriptors.
    pub fn start(&self) -> io::Result<()> {
        let mut state = lock(&self.shared.state);
        if let State::Running(_) = *state {
            return Ok(());
        }
        let events = EventManager::new().map_err(io::Error::other)?;
        let endpoint = events.remote_endpoint();
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let thread = std::thread::Builder::new()
            .name(self.shared.thread.name().into())
            .spawn(move || run(events, &until))?;
        *state = State::Running(Running { endpoint, stop, thread });
        self.shared.changed.notify_all();
        Ok(())
    }

    /// Says that its thread will not be started, if it isn't running: nobody waits for it any longer.
    pub fn refuse(&self) {
        let mut state = lock(&self.shared.state);
        if !matches!(*state, State::Running(_)) {
            *state = State::Refused;
            self.shared.changed.notify_all();
        }
    }

    /// What backends hand their devices over with.
    pub fn handle(&self) -> WorkerHandle {
        WorkerHandle { shared: self.shared.clone() }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        let state = std::mem::replace(&mut *lock(&self.shared.state), State::Refused);
        self.shared.changed.notify_all();
        let State::Running(running) = state else { return };
        running.stop.store(true, Ordering::SeqCst);
        // The only failure is a counter at its limit, which wakes just as well.
        let _ = running.endpoint.kick();
        // A thread that panicked is gone all the same.
        let _ = running.thread.join();
    }
}

impl WorkerHandle {
    /// Tells a device which features its driver has accepted, and begins to serve it.
    pub(super) fn serve(&self, served: Served) -> io::Result<SubscriberId> {
        let (endpoint, shared) = (self.endpoint()?, self.shared.clone());
        endpoint
            .call_blocking(move |events| {
                if !shared.narrowed.swap(true, Ordering::SeqCst) {
                    narrow(shared.thread);
                }
                lock(&served.device).ack_features(served.activation.features);
                let id = events.add_subscriber(served);
                match events.subscriber_mut(id)?.failed.take() {
                    None => Ok(id),
                    Some(e) => {
                        events.remove_subscriber(id)?;
                        Err(e)
                    }
                }
            })
            .map_err(|e: Error| io::Error::other(e))
    }

    /// Stops serving a device, if it is being served, and resets it. When this returns the thread has let
    /// go of queues and memory.
    pub(super) fn release(&self, id: Option<SubscriberId>, device: Shareable) {
        // Without a thread the machine ends, and nobody uses the device any more.
        let Ok(endpoint) = self.endpoint() else { return };
        let released = endpoint.call_blocking(move |events| {
            let removed = id.map(|id| events.remove_subscriber(id)).transpose();
            lock(&device).reset();
            removed.map(drop)
        });
        if let Err(e) = released {
            tracing::error!("device thread: {e}");
        }
    }

    /// What reaches its thread, which this waits for.
    fn endpoint(&self) -> io::Result<RemoteEndpoint<Served>> {
        let Shared { state, changed, wanted, .. } = &*self.shared;
        let mut state = lock(state);
        loop {
            match &*state {
                State::Running(running) => return Ok(running.endpoint.clone()),
                State::Refused => {
                    return Err(io::Error::other("the device's thread isn't running"));
                }
                State::Wanted => {}
                State::Unused => {
                    *state = State::Wanted;
                    wanted.write(1)?;
                }
            }
            state = changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn run(mut events: EventManager<Served>, stop: &AtomicBool) {
    while !stop.load(Ordering::SeqCst) {
        match events.run() {
            Ok(_) => {}
            Err(Error::Epoll(e)) if e.errno() == libc::EINTR => {}
            Err(e) => {
                tracing::error!("device thread: {e}");
                return;
            }
        }
    }
}

/// A device that its worker and its window share.
pub(super) type Shareable = Arc<Mutex<Box<dyn VirtioDevice>>>;

/// An activated device.
pub(super) struct Served {
    device: Shareable,
    activation: Activation,
    broken: bool,
    /// Counts what broke the device, over all activations.
    breaks: Arc<LogLimit>,
    /// Why it could not be watched.
    failed: Option<Error>,
}

/// The event data of [`VirtioDevice::host_events`]; doorbells have their queue's index.
const HOST: u32 = u32::MAX;

impl Served {
    pub fn new(device: Shareable, activation: Activation, breaks: Arc<LogLimit>) -> Self {
        Self { device, activation, broken: false, breaks, failed: None }
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
            if let Some(count) = self.breaks.admit() {
                let kind = lock(&self.device).device_type();
                tracing::error!(
                    device = kind,
                    count,
                    "virtio device stopped until it is reset: {e}"
                );
            }
            self.broken = true;
            self.stop_watching(ops);
            self.activation.interrupt.demand_reset();
        }
    }
}
