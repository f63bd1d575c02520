//! Do further CPUs start, and can they be interrupted?
//!
//! The boot CPU starts `cpus=N` less one others by INIT and start-up interrupts; each reaches
//! ring 3, says who it is, takes an interrupt from the boot CPU and halts. With the word `mptable`
//! on the command line the MultiProcessor table must name as many CPUs.
#![no_std]
#![no_main]

mod mp_table;
mod rt;

use core::sync::atomic::{AtomicBool, Ordering};

use rt::report::{check, fail, ok};
use rt::tables::MAX_CPUS;
use rt::{apic, boot, cmdline, time, trap};

const TRAMPOLINE_PAGE: u8 = 8;
const FIRST_VECTOR: u8 = 0x60;

static STARTED: [AtomicBool; MAX_CPUS] = [const { AtomicBool::new(false) }; MAX_CPUS];

fn main() {
    let cpus = cmdline::number("cpus").unwrap_or(1);
    let Ok(cpus @ 1..=32) = u8::try_from(cpus) else {
        return fail("cpus", format_args!("{cpus} of them"));
    };
    if cmdline::words().any(|word| word == "mptable") {
        mp_table(cpus);
    }
    let code = boot::trampoline();
    let page = (u64::from(TRAMPOLINE_PAGE) << 12) as *mut u8;
    // SAFETY: low memory, which the loader has no use for any more.
    unsafe { page.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    rt::on_startup(further_cpu);
    apic::enable();
    for id in 1..cpus {
        start(id);
        apic::interrupt(id, FIRST_VECTOR + id);
        let came = time::wait_until(|| trap::interrupts(FIRST_VECTOR + id) == 1);
        check("interrupt to a CPU", came, format_args!("CPU {id} did not take it"));
    }
    let all = boot::cpus();
    check("no CPU started twice", all == cpus.into(), format_args!("{all} starts"));
}

fn mp_table(cpus: u8) {
    match mp_table::cpus() {
        Ok(found) => check("mp table", found == cpus, format_args!("it names {found} CPUs")),
        Err(reason) => fail("mp table", format_args!("{reason}")),
    }
}

fn start(id: u8) {
    let started = &STARTED[usize::from(id)];
    apic::start_cpu(id, TRAMPOLINE_PAGE);
    if time::wait_until(|| started.load(Ordering::SeqCst)) {
        ok("start of a CPU");
    } else {
        fail("start of a CPU", format_args!("CPU {id} did not reach ring 3"));
    }
}

fn further_cpu() -> ! {
    apic::enable();
    trap::enable_interrupts();
    let id = apic::id();
    if let Some(started) = STARTED.get(usize::from(id)) {
        started.store(true, Ordering::SeqCst);
    }
    while trap::interrupts(FIRST_VECTOR + id) == 0 {
        core::hint::spin_loop();
    }
    trap::park()
}
