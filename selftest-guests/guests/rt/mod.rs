//! What every self-test guest stands on: it is entered in ring 0, sets the processor up, and runs
//! the guest's `main` in ring 3, where port I/O, device memory and the guest's own tables are open
//! to it. Ring 0 keeps only what needs it (`boot`, `trap`).
//!
//! A guest says what it finds on the first serial port (`report`) and then switches the machine
//! off.

#![allow(dead_code, reason = "no guest needs all of this")]

pub mod apic;
pub mod boot;
pub mod cmdline;
mod memory;
pub mod port;
pub mod report;
pub mod tables;
pub mod time;
pub mod trap;

use core::sync::atomic::{AtomicPtr, Ordering};

/// What further CPUs run in ring 3.
static STARTUP_MAIN: AtomicPtr<()> = AtomicPtr::new(core::ptr::null_mut());

/// Names what further CPUs run in ring 3, before any is started.
pub fn on_startup(main: fn() -> !) {
    STARTUP_MAIN.store(main as *mut (), Ordering::SeqCst);
}

/// Ring 3 begins here, on a stack of the CPU's own, with interrupts off.
extern "sysv64" fn start(entry: boot::Entry, parameter: u64) -> ! {
    if entry == boot::Entry::Startup {
        let main = STARTUP_MAIN.load(Ordering::SeqCst);
        // SAFETY: `on_startup` stored a `fn() -> !` before it started this CPU.
        let main: fn() -> ! = unsafe { core::mem::transmute(main) };
        main()
    }
    cmdline::copy(entry, parameter);
    apic::mask_legacy_interrupts();
    crate::main();
    report::power_off()
}

#[panic_handler]
fn panic(info: &core::panic::PanicInfo<'_>) -> ! {
    report::fail("panic", format_args!("{info}"));
    report::power_off()
}
