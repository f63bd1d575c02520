//! A machine: made, given devices and a kernel, and run to its guest's end.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::cpuid::Topology;
use super::kick::{self, Kick};
use super::ports::Ports;
use super::resident;
use super::serial::{Pump, SerialPort};
use super::vcpu::{self, Shared};
use super::vm::{self, Vm};
use super::workers::{DeviceGroup, Workers};
use super::{Kernel, KvmError, MAX_CPUS, boot, cpuid, layout, registers};
use crate::GuestMemory;
use crate::borrow::borrow_fd;
use crate::config::GuestEnd;
use crate::jail::seccomp::threads::{Thread, narrow};
use crate::log_limit::LogLimit;
use crate::memory;
use crate::sync::lock;
use crate::transport::Backend;
use crate::transport::mmio::{LocalBackend, MmioTransport, QUEUE_NOTIFY};
use crate::virtio::VirtioDevice;

/// Sees an exit that would end the guest as [`GuestEnd::Broken`] before anything is done about it,
/// on the processor's thread; says whether it has dealt with it, so that the guest goes on. Tests
/// use it to stand in for what a host's KVM can't do.
pub type ExitHook = Box<dyn FnMut(&mut VcpuFd) -> bool + Send>;

/// How long the end of a machine waits for the reader of its console.
const CONSOLE_PATIENCE: Duration = Duration::from_secs(1);

/// For how long a guest is starting.
const START: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// How long threads take to begin, at most, on a machine that isn't busy.
const THREAD_START: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// How often the thread that serves the console is interrupted until it ends.
const INTERRUPT_INTERVAL: Duration = Duration::from_millis(1);

/// A virtual machine.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: Vec<VcpuFd>,
    memory: GuestMemory,
    bus: Bus,
    pump: Option<Pump>,
    workers: Workers,
    hook: Option<ExitHook>,
    stop: Arc<EventFd>,
}

/// Stops a machine from another thread.
#[derive(Clone)]
pub struct Stopper(Arc<EventFd>);

impl Stopper {
    /// Makes [`Machine::run`] return [`KvmError::Stopped`] soon, whatever the guest does.
    pub fn stop(&self) {
        // The only failure is a counter at its limit, which wakes just as well.
        let _ = self.0.write(1);
    }
}

/// What stops a machine before its guest ends, besides a [`Stopper`].
#[derive(Debug, Clone, Copy)]
pub enum Until<'a> {
    /// Nothing.
    End,
    /// The other end of this connected socket closes.
    HangUp(BorrowedFd<'a>),
    /// This descriptor becomes readable. The process ends then, so nothing is waited for: a guest can keep
    /// the threads of its devices busy for as long as it likes.
    Readable(BorrowedFd<'a>),
}

impl<'a> Until<'a> {
    fn polled(self) -> Option<PollFd<'a>> {
        match self {
            Self::End => None,
            // POLLHUP is reported unasked; POLLIN would also tell of data, which nobody sends.
            Self::HangUp(fd) => Some(PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)),
            Self::Readable(fd) => Some(PollFd::from_borrowed_fd(fd, PollFlags::IN)),
        }
    }
}

/// What a guest's accesses outside of memory reach.
#[derive(Default)]
pub(super) struct Bus {
    pub ports: Ports,
    /// The virtio-mmio windows, one after the other from [`layout::MMIO_WINDOWS`].
    windows: Vec<Mutex<MmioTransport>>,
    nowhere: LogLimit,
}

impl Bus {
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.window(address) {
            Some((window, offset)) => lock(window).read(offset, data),
            None => {
                self.log_nowhere("reads", address);
                data.fill(0xff);
            }
        }
    }

    pub fn write(&self, address: u64, data: &[u8]) {
        match self.window(address) {
            Some((window, offset)) => lock(window).write(offset, data),
            None => self.log_nowhere("writes", address),
        }
    }

    fn window(&self, address: u64) -> Option<(&Mutex<MmioTransport>, u64)> {
        let offset = address.checked_sub(layout::MMIO_WINDOWS)?;
        let index = usize::try_from(offset / layout::MMIO_WINDOW_SIZE).ok()?;
        Some((self.windows.get(index)?, offset % layout::MMIO_WINDOW_SIZE))
    }

    fn log_nowhere(&self, what: &str, address: u64) {
        if let Some(count) = self.nowhere.admit() {
            tracing::warn!(count, "guest {what} {address:#x}, where nothing is");
        }
    }
}

impl Machine {
    /// Makes a machine of a VM.
    ///
    /// # Errors
    /// A size out of range, or a host that can't give what it takes.
    pub fn new(vm: Vm, memory_mib: u64, cpus: u8) -> Result<Self, KvmError> {
        if !(1..=MAX_CPUS).contains(&cpus) {
            return Err(KvmError::Cpus(cpus));
        }
        let Vm { kvm, fd: vm, tsc_deadline } = vm;
        let memory = memory::allocate(memory_mib)?;
        let vcpus = create_vcpus(&kvm, &vm, Topology { cpus, tsc_deadline })?;
        let stop =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(KvmError::host("make an eventfd"))?;
        Ok(Self {
            vm: Arc::new(vm),
            vcpus,
            memory,
            bus: Bus::default(),
            pump: None,
            workers: Workers::new()?,
            hook: None,
            stop: Arc::new(stop),
        })
    }

    /// The guest's memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Gives it a serial port that reads `input` and writes `output`.
    ///
    /// # Errors
    /// The host is out of file descriptors.
    pub fn add_serial(
        &mut self,
        input: Option<OwnedFd>,
        output: Option<OwnedFd>,
    ) -> Result<(), KvmError> {
        let vm = self.vm.clone();
        let pulse = Box::new(move || {
            vm.set_irq_line(layout::SERIAL_IRQ, true)?;
            Ok(vm.set_irq_line(layout::SERIAL_IRQ, false)?)
        });
        let (port, pump) =
            SerialPort::new(pulse, input, output).map_err(KvmError::host("make a serial port"))?;
        self.bus.ports.serial = Some(port);
        self.pump = Some(pump);
        Ok(())
    }

    /// Gives it a virtio device that one of its own threads serves. The guest finds devices in the
    /// order in which they were added.
    ///
    /// # Errors
    /// There is no interrupt line left, or the host is out of file descriptors.
    pub fn add_device(
        &mut self,
        device: Box<dyn VirtioDevice>,
        group: DeviceGroup,
    ) -> Result<(), KvmError> {
        let worker = self.workers.handle(group);
        self.add_backend(Box::new(LocalBackend::new(device, worker)))
    }

    /// Gives it a virtio device, whoever serves it.
    ///
    /// # Errors
    /// There is no interrupt line left, or the host is out of file descriptors.
    pub fn add_backend(&mut self, backend: Box<dyn Backend>) -> Result<(), KvmError> {
        let index = self.bus.windows.len();
        if index >= layout::MAX_DEVICES {
            return Err(KvmError::TooManyDevices);
        }
        let vm = self.vm.clone();
        let connect = move |doorbells: &[EventFd], interrupt: &EventFd| {
            let notify = IoEventAddress::Mmio(layout::window(index) + QUEUE_NOTIFY);
            for (queue, doorbell) in (0u32..).zip(doorbells) {
                vm.register_ioevent(doorbell, &notify, queue)?;
            }
            Ok(vm.register_irqfd(interrupt, layout::device_irq(index))?)
        };
        let transport = MmioTransport::new(backend, self.memory.clone(), Box::new(connect))
            .map_err(KvmError::host("make a virtio device's eventfds"))?;
        self.bus.windows.push(Mutex::new(transport));
        Ok(())
    }

    /// Lets `hook` see exits before they end the guest.
    pub fn set_exit_hook(&mut self, hook: ExitHook) {
        self.hook = Some(hook);
    }

    /// What stops the machine from another thread.
    pub fn stopper(&self) -> Stopper {
        Stopper(self.stop.clone())
    }

    /// Loads a kernel and prepares the first processor to enter it. The command line gets the
    /// machine's devices appended, so devices come first.
    ///
    /// # Errors
    /// A kernel that can't be booted here, or does not fit.
    pub fn boot(&mut self, mut kernel: Kernel) -> Result<(), KvmError> {
        kernel.cmdline = boot::announce_devices(&kernel.cmdline, self.bus.windows.len());
        let entry = boot::load(&self.memory, kernel, self.vcpus.len() as u8)?;
        match self.vcpus.first() {
            Some(first) => registers::set_boot_state(first, &self.memory, entry),
            None => Err(KvmError::Cpus(0)),
        }
    }

    /// Runs the guest to its end.
    ///
    /// # Errors
    /// [`KvmError::Stopped`] when it was told to stop, else a failure of the host.
    pub fn run(self) -> Result<GuestEnd, KvmError> {
        self.run_until(Until::End)
    }

    /// The same, and stops when this happens.
    ///
    /// # Errors
    /// As [`Machine::run`].
    pub fn run_until(self, until: Until<'_>) -> Result<GuestEnd, KvmError> {
        let ended =
            EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(KvmError::host("make an eventfd"))?;
        let shared = Arc::new(Shared {
            bus: self.bus,
            memory: self.memory,
            hook: self.hook.map(Into::into),
            stop: AtomicBool::new(false),
            end: None.into(),
            ended,
        });
        let serial = self.pump.map(|pump| SerialThread::start(pump, &shared)).transpose()?;
        // As late as can be: KVM answers this only when it has finished what the interrupt
        // controllers began.
        vm::add_memory(&self.vm, &shared.memory)?;
        let mut processors =
            Processors { shared: shared.clone(), threads: Vec::new(), workers: self.workers };
        for (index, vcpu) in self.vcpus.into_iter().enumerate() {
            processors.start(index, vcpu)?;
        }
        let waited = wait(&shared.ended, &self.stop, &processors.workers, until);
        if let (Ok(Wakeup::Stopped), Until::Readable(_)) = (&waited, until) {
            std::mem::forget((processors, serial, self.vm));
            return Err(KvmError::Stopped);
        }
        if let (Ok(Wakeup::Ended), Some(console)) = (&waited, &shared.bus.ports.serial) {
            // Its thread ends while the processors' do.
            console.begin_to_finish();
        }
        drop(processors);
        if let (Some(mut serial), Ok(Wakeup::Ended)) = (serial, &waited) {
            serial.patience = CONSOLE_PATIENCE;
        }
        // Before the memory: KVM would look for each page of it that goes.
        drop(self.vm);
        match waited? {
            Wakeup::Ended => lock(&shared.end).take().ok_or(KvmError::Stopped),
            Wakeup::Stopped => Err(KvmError::Stopped),
        }
    }
}

/// The processors' threads. Dropped, it stops them and waits until they are gone, and then until those
/// of the devices are.
struct Processors {
    shared: Arc<Shared>,
    threads: Vec<(Kick, JoinHandle<VcpuFd>)>,
    workers: Workers,
}

impl Processors {
    fn start(&mut self, index: usize, vcpu: VcpuFd) -> Result<(), KvmError> {
        let kick = Kick::new(&vcpu)?;
        let shared = self.shared.clone();
        let thread = std::thread::Builder::new()
            .name(format!("vcpu{index}"))
            .spawn(move || vcpu::run(index, vcpu, &shared))
            .map_err(KvmError::host("start a vCPU's thread"))?;
        self.threads.push((kick, thread));
        Ok(())
    }
}

impl Drop for Processors {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        if let Some(serial) = &self.shared.bus.ports.serial {
            serial.stop_waiting();
        }
        self.workers.refuse();
        for (kick, thread) in &self.threads {
            kick.kick(thread);
        }
        for (_, thread) in self.threads.drain(..) {
            // A thread that panicked is gone all the same.
            let _ = thread.join();
        }
    }
}

/// The serial port's thread. Dropped, it lets it write out what the guest has written, for as long
/// as it has patience, and waits until it is gone.
struct SerialThread {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    patience: Duration,
}

impl SerialThread {
    fn start(pump: Pump, shared: &Arc<Shared>) -> Result<Self, KvmError> {
        kick::install_handler()?;
        let thread = std::thread::Builder::new()
            .name("serial".into())
            .spawn(|| pump.run())
            .map_err(KvmError::host("start the serial port's thread"))?;
        Ok(Self { shared: shared.clone(), thread: Some(thread), patience: Duration::ZERO })
    }
}

impl Drop for SerialThread {
    fn drop(&mut self) {
        let Some(thread) = self.thread.take() else { return };
        if let Some(serial) = &self.shared.bus.ports.serial {
            serial.finish(self.patience);
            // A terminal can make it wait in a write although it was ready: it is interrupted until
            // it sees that nothing is left to do.
            while !serial.has_ended(INTERRUPT_INTERVAL) && !thread.is_finished() {
                kick::interrupt(&thread);
            }
        }
        let _ = thread.join();
    }
}

enum Wakeup {
    Ended,
    Stopped,
}

/// Waits for the guest's end or for being told to stop, and starts the devices' threads: each when the
/// guest uses it, and all when it has started. A guest that takes its time lives beside a smaller process.
fn wait(
    ended: &EventFd,
    stop: &EventFd,
    workers: &Workers,
    until: Until<'_>,
) -> Result<Wakeup, KvmError> {
    let mut patience = Some(START);
    let mut all_run = false;
    loop {
        let (ended, stop) = (borrow_fd(ended), borrow_fd(stop));
        let mut fds = vec![
            PollFd::from_borrowed_fd(workers.wanted(), PollFlags::IN),
            PollFd::from_borrowed_fd(ended, PollFlags::IN),
            PollFd::from_borrowed_fd(stop, PollFlags::IN),
        ];
        fds.extend(until.polled());
        match poll(&mut fds, patience.as_ref()) {
            Ok(0) if !all_run => {
                workers.start_all()?;
                all_run = true;
                patience = Some(THREAD_START);
            }
            Ok(0) => {
                narrow(Thread::Waiting);
                resident::release_program();
                patience = None;
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(KvmError::host("wait for the guest")(e)),
        }
        let is_ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        if is_ready(&fds[1]) {
            return Ok(Wakeup::Ended);
        }
        if fds[2..].iter().any(is_ready) {
            return Ok(Wakeup::Stopped);
        }
        if is_ready(&fds[0]) {
            workers.start_wanted()?;
        }
    }
}

fn create_vcpus(kvm: &Kvm, vm: &VmFd, topology: Topology) -> Result<Vec<VcpuFd>, KvmError> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(KvmError::ioctl("get the CPUID leaves that KVM supports"))?;
    (0..topology.cpus)
        .map(|id| {
            let vcpu = vm.create_vcpu(id.into()).map_err(KvmError::ioctl("create a vCPU"))?;
            let mut leaves = supported.clone();
            cpuid::fill_in(&mut leaves, topology, id);
            vcpu.set_cpuid2(&leaves).map_err(KvmError::ioctl("set a vCPU's CPUID leaves"))?;
            Ok(vcpu)
        })
        .collect()
}
