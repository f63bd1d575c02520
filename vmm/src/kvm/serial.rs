//! The serial port: a 16550A whose far end is a pair of file descriptors of the host.
//!
//! The guest's processors never wait in a host file descriptor. What the guest writes goes to a
//! bounded outbox that a thread of its own, the [`Pump`], writes out; a processor that finds the
//! outbox full waits until it has room or the machine stops, and holds no lock meanwhile. What the
//! host has for the guest is read only as far as the port's FIFO has room.
//!
//! The interrupt line is pulsed by a call to KVM and not through an irqfd: the end of a machine waits
//! for each irqfd that it has, for as long as starting one takes.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use vm_superio::Trigger;
use vm_superio::serial::{Serial, SerialEvents};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::borrow::borrow_fd;
use crate::jail::seccomp::threads::{Thread, narrow};
use crate::sync::lock;

/// How many bytes the guest may be ahead of the reader of its console.
const OUTBOX_SIZE: usize = 64 << 10;

/// What is written at once: a pipe that is ready takes as much without blocking.
const CHUNK: usize = 4096;

type Device = Serial<IrqLine, InputSpace, OutboxWriter>;

/// Pulses the port's interrupt line.
pub(super) type Pulse = Box<dyn Fn() -> io::Result<()> + Send>;

/// The guest's end.
pub(super) struct SerialPort {
    device: Arc<Mutex<Device>>,
    outbox: Arc<Outbox>,
}

/// The host's end: moves bytes between the port and its file descriptors until it is told to
/// finish.
pub(super) struct Pump {
    device: Arc<Mutex<Device>>,
    outbox: Arc<Outbox>,
    input: Option<OwnedFd>,
    output: Option<OwnedFd>,
    /// Whether its thread has its list of system calls.
    narrowed: bool,
}

impl SerialPort {
    /// Makes a port that raises its interrupt by `pulse`.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn new(
        pulse: Pulse,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> io::Result<(Self, Pump)> {
        let outbox = Arc::new(Outbox {
            state: Mutex::new(OutboxState {
                bytes: VecDeque::new(),
                discard: output.is_none(),
                released: false,
                finish: false,
                ended: false,
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let space = InputSpace(outbox.clone());
        let writer = OutboxWriter(outbox.clone());
        let device = Arc::new(Mutex::new(Serial::with_events(IrqLine(pulse), space, writer)));
        let port = Self { device: device.clone(), outbox: outbox.clone() };
        Ok((port, Pump { device, outbox, input, output, narrowed: false }))
    }

    /// Reads one of the port's eight registers.
    pub fn read(&self, register: u16) -> u8 {
        lock(&self.device).read(register as u8)
    }

    /// Writes one of the port's eight registers. Waits while the outbox is full.
    pub fn write(&self, register: u16, value: u8) {
        // An interrupt that can't be raised or a byte that can't be kept is lost, as on a wire.
        let _ = lock(&self.device).write(register as u8, value);
        self.outbox.wait_for_room();
    }

    /// Lets go of processors that wait for room, now and from now on.
    pub fn stop_waiting(&self) {
        self.outbox.stop_waiting();
    }

    /// Tells the pump to end once the outbox is empty. What the guest writes after that may be lost.
    pub fn begin_to_finish(&self) {
        self.outbox.begin_to_finish();
    }

    /// The same, and waits for that, `patience` at most; what is left then is thrown away.
    pub fn finish(&self, patience: Duration) {
        self.outbox.finish(patience);
    }

    /// Waits a moment for the pump's end, and says whether it has come.
    pub fn has_ended(&self, moment: Duration) -> bool {
        self.outbox.has_ended(moment)
    }
}

impl Pump {
    /// Pumps until [`SerialPort::finish`].
    pub fn run(mut self) {
        while !self.outbox.is_finished() {
            if let Err(e) = self.turn() {
                tracing::warn!("serial console: {e}");
                break;
            }
        }
        self.outbox.end();
    }

    /// Waits until something can be moved, and moves it.
    fn turn(&mut self) -> io::Result<()> {
        let has_output = !lock(&self.outbox.state).bytes.is_empty();
        let room = lock(&self.device).fifo_capacity();
        let input = self.input.as_ref().filter(|_| room > 0);
        let output = self.output.as_ref().filter(|_| has_output);

        let mut fds = vec![PollFd::from_borrowed_fd(borrow_fd(&self.outbox.wake), PollFlags::IN)];
        fds.extend(input.map(|fd| PollFd::new(fd, PollFlags::IN)));
        fds.extend(output.map(|fd| PollFd::new(fd, PollFlags::OUT)));
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(e) => return Err(e.into()),
        }
        // Only now: a start isn't to wait for it.
        if !std::mem::replace(&mut self.narrowed, true) {
            narrow(Thread::Serial);
        }
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        let input_ready = input.is_some() && ready[1];
        let output_ready = output.is_some() && ready.last() == Some(&true);

        if ready[0] {
            let _ = self.outbox.wake.read();
        }
        if output_ready {
            self.write_out();
        }
        if input_ready {
            self.read_in(room);
        }
        Ok(())
    }

    fn write_out(&mut self) {
        let Some(output) = &self.output else { return };
        let chunk: Vec<u8> = lock(&self.outbox.state).bytes.iter().take(CHUNK).copied().collect();
        match rustix::io::write(output, &chunk) {
            Ok(written) => self.outbox.remove(written),
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => {
                tracing::warn!("serial console: its output cannot be written any more: {e}");
                self.output = None;
                self.outbox.discard();
            }
        }
    }

    fn read_in(&mut self, room: usize) {
        let Some(input) = &self.input else { return };
        let mut buffer = [0; 64];
        let room = room.min(buffer.len());
        match rustix::io::read(input, &mut buffer[..room]) {
            Ok(0) => self.input = None,
            Ok(read) => {
                // A port in loop-back mode takes nothing: the bytes are lost, as on a wire.
                let _ = lock(&self.device).enqueue_raw_bytes(&buffer[..read]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => {
                tracing::warn!("serial console: its input cannot be read any more: {e}");
                self.input = None;
            }
        }
    }
}

/// What the guest has written and the host has not taken yet.
struct Outbox {
    state: Mutex<OutboxState>,
    /// Signalled when bytes are removed or thrown away.
    changed: Condvar,
    /// Wakes the pump.
    wake: EventFd,
}

struct OutboxState {
    bytes: VecDeque<u8>,
    /// Nothing is kept any more.
    discard: bool,
    /// Nobody waits for room any more.
    released: bool,
    /// The pump ends when nothing is left.
    finish: bool,
    /// The pump has ended.
    ended: bool,
}

impl Outbox {
    fn push(&self, bytes: &[u8]) {
        let mut state = lock(&self.state);
        if state.discard {
            return;
        }
        let was_empty = state.bytes.is_empty();
        state.bytes.extend(bytes);
        if was_empty {
            self.wake();
        }
    }

    fn remove(&self, count: usize) {
        let mut state = lock(&self.state);
        let count = count.min(state.bytes.len());
        state.bytes.drain(..count);
        self.changed.notify_all();
    }

    fn wait_for_room(&self) {
        let state = lock(&self.state);
        let full = |state: &mut OutboxState| state.bytes.len() >= OUTBOX_SIZE && !state.released;
        drop(self.changed.wait_while(state, full).unwrap_or_else(PoisonError::into_inner));
    }

    fn stop_waiting(&self) {
        lock(&self.state).released = true;
        self.changed.notify_all();
    }

    fn end(&self) {
        self.discard();
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    fn has_ended(&self, moment: Duration) -> bool {
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, moment, |state| !state.ended);
        waited.unwrap_or_else(PoisonError::into_inner).0.ended
    }

    fn discard(&self) {
        let mut state = lock(&self.state);
        state.discard = true;
        state.released = true;
        state.bytes.clear();
        self.changed.notify_all();
    }

    fn begin_to_finish(&self) {
        lock(&self.state).finish = true;
        self.wake();
    }

    fn finish(&self, patience: Duration) {
        self.begin_to_finish();
        let state = lock(&self.state);
        let waited = self.changed.wait_timeout_while(state, patience, |s| !s.bytes.is_empty());
        drop(waited.unwrap_or_else(PoisonError::into_inner));
        self.discard();
        self.wake();
    }

    fn is_finished(&self) -> bool {
        let state = lock(&self.state);
        state.finish && state.bytes.is_empty()
    }

    fn wake(&self) {
        // The only failure is a counter at its limit, which wakes just as well.
        let _ = self.wake.write(1);
    }
}

/// The port's transmitter.
struct OutboxWriter(Arc<Outbox>);

impl Write for OutboxWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Wakes the pump when the port has room for input again.
struct InputSpace(Arc<Outbox>);

impl SerialEvents for InputSpace {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        self.0.wake();
    }
}

/// The port's interrupt line.
struct IrqLine(Pulse);

impl Trigger for IrqLine {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        (self.0)()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    const DATA: u16 = 0;
    const LINE_STATUS: u16 = 5;

    fn irq() -> Pulse {
        Box::new(|| Ok(()))
    }

    #[test]
    fn output_arrives_whole_and_in_order() {
        let (mut reader, writer) = io::pipe().unwrap();
        let (port, pump) = SerialPort::new(irq(), None, Some(writer.into())).unwrap();
        let thread = std::thread::spawn(|| pump.run());
        let sent: Vec<u8> = (0..200_000u32).map(|i| (i % 251) as u8).collect();
        let reading = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            reader.read_to_end(&mut bytes).unwrap();
            bytes
        });
        sent.iter().for_each(|byte| port.write(DATA, *byte));
        port.finish(Duration::from_secs(60));
        thread.join().unwrap();
        assert!(reading.join().unwrap() == sent);
    }

    #[test]
    fn a_processor_that_waits_for_a_stuck_reader_is_let_go() {
        let (_reader, writer) = io::pipe().unwrap();
        let (port, pump) = SerialPort::new(irq(), None, Some(writer.into())).unwrap();
        let port = Arc::new(port);
        let pumping = std::thread::spawn(|| pump.run());
        let processor = {
            let port = port.clone();
            std::thread::spawn(move || (0..OUTBOX_SIZE * 3).for_each(|_| port.write(DATA, b'x')))
        };
        while lock(&port.outbox.state).bytes.len() < OUTBOX_SIZE {
            std::thread::yield_now();
        }
        port.stop_waiting();
        processor.join().unwrap();
        port.finish(Duration::ZERO);
        pumping.join().unwrap();
    }

    #[test]
    fn input_waits_for_room() {
        let (reader, mut writer) = io::pipe().unwrap();
        let (port, pump) = SerialPort::new(irq(), Some(reader.into()), None).unwrap();
        let pumping = std::thread::spawn(|| pump.run());
        let sent: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        writer.write_all(&sent).unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            if port.read(LINE_STATUS) & 1 == 0 {
                std::thread::yield_now();
                continue;
            }
            received.push(port.read(DATA));
        }
        assert_eq!(received, sent);
        port.finish(Duration::ZERO);
        pumping.join().unwrap();
    }

    #[test]
    fn a_reader_that_went_away_costs_the_output_only() {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let (port, pump) = SerialPort::new(irq(), None, Some(writer.into())).unwrap();
        let pumping = std::thread::spawn(|| pump.run());
        (0..100_000).for_each(|_| port.write(DATA, b'x'));
        port.finish(Duration::from_secs(60));
        pumping.join().unwrap();
        assert!(lock(&port.device).writer().0.is_finished());
    }
}
