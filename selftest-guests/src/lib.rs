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
    /// Switches the machine off with its first instructions.
    SHUTDOWN = "shutdown";
    /// Resets the machine through the keyboard controller with its first instructions.
    RESET = "reset";
    /// Ends in a triple fault.
    TRIPLE_FAULT = "triple_fault";
    /// Says `ok spinning` and runs until somebody ends it.
    SPIN = "spin";
}
