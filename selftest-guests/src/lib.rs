//! Tiny bare-metal guests, embedded as ELF images.
//!
//! Each is an x86-64 ELF with the 64-bit entry of Linux's boot protocol and a PVH note, so any
//! machine that boots a Linux kernel boots it. What it finds it says on the first serial port, a
//! line each: `ok NAME`, `FAIL NAME: reason`, or a measurement `NAME KEY=VALUE ...`. Then it
//! switches the machine off by a write to port 0x501, unless it ends in the way that it is there to
//! test.
//!
//! They need little of the machine: a few thousand instructions in ring 0, everything else in
//! ring 3; interrupts that come while they spin, never a halted processor. So they also run where
//! KVM emulates ring 0 in software.

/// A guest: its name and its ELF image.
#[derive(Debug, Clone, Copy)]
pub struct Guest {
    /// The name of its source file.
    pub name: &'static str,
    /// The ELF image.
    pub image: &'static [u8],
}

macro_rules! guests {
    ($($(#[$doc:meta])+ $constant:ident = $name:literal;)+) => {
        $($(#[$doc])+
        pub const $constant: Guest = Guest {
            name: $name,
            image: include_bytes!(concat!(env!("OUT_DIR"), "/", $name)),
        };)+

        /// All guests.
        pub const ALL: &[Guest] = &[$($constant),+];
    };
}

guests! {
    /// Exceptions and interrupts out of ring 3, `SYSCALL` into ring 0 and `SYSRET` back.
    RING_TRANSITIONS = "ring_transitions";
    /// The speed of ring 0 beside that of ring 3, by the time stamp counter. Lines `ring0` and
    /// `ring3` with `instructions=`, `ticks=`, and with `tsc_khz=N` on the command line
    /// `per_second=`.
    RING_SPEED = "ring_speed";
    /// Device memory and ports where nothing is.
    MMIO_NOWHERE = "mmio_nowhere";
    /// Start of further CPUs, `cpus=N` in all, and interrupts to them; with the word `mptable` the
    /// MultiProcessor table too.
    SMP = "smp";
    /// The devices that `virtio_mmio.device=` words name, before any driver: a line `device` each.
    VIRTIO_DISCOVERY = "virtio_discovery";
    /// All block devices: reads, writes, flushes, refusals. Each 8-byte word of a disk holds its
    /// own number; of a disk that isn't read-only the first 64 sectors of the second half hold the
    /// complement in the end. At least 256 sectors.
    BLOCK = "block";
    /// The vsock device: `vsock_refused=PORT`, `vsock_port=PORT` with `vsock_bytes=N` (all of which
    /// the host sends back), `vsock_listen=PORT` (the guest sends back what the host sends). It
    /// wants the host's credit to run out and says when it has: the host must not read before.
    VSOCK = "vsock";
    /// The network device: sends a frame to everyone with its address and its MTU, and then
    /// `net_frames=N` times what it gets, to whom it came from. Frames are of Ethernet type 0x88b5.
    NET = "net";
    /// The balloon's reports of free memory: pages that are reported are empty, the others not.
    FREE_PAGES = "free_pages";
    /// The entropy device and the virtio console, those that are there: says `hello from the
    /// guest`, and with the word `echo` sends back one line.
    RNG_AND_CONSOLE = "rng_and_console";
    /// Attacks all devices: their registers, rings and requests. `memory_mib=N` is where memory ends;
    /// `vsock_port=PORT` the host's port; with `vsock_connections=N` it says `ok listening`, waits for
    /// as many (256 at most) of the host and sends more than they take; with the word `race` a second
    /// CPU takes part. A share needs `rootfs/`, in which it makes a thousand files. What a disk holds
    /// afterwards is undefined.
    HOSTILE = "hostile";
    /// Has the host raise as many interrupts as it can: all devices, timers and `cpus=N` CPUs at once;
    /// with the word `endless` until somebody ends it. Says `ok storming` first.
    STORM = "storm";
    /// Writes to its console until somebody ends it.
    BABBLE = "babble";
    /// Switches the machine off with its first instructions.
    SHUTDOWN = "shutdown";
    /// Resets the machine through the keyboard controller with its first instructions.
    RESET = "reset";
    /// Ends in a triple fault.
    TRIPLE_FAULT = "triple_fault";
    /// Says `.` with its first instructions and waits, using no CPU, until somebody ends it.
    IDLE = "idle";
    /// Says `ok spinning` and runs, with its interrupts off, until somebody ends it.
    SPIN = "spin";
}
