//! How fast is ring 0, beside ring 3?
//!
//! Runs the same loop of two instructions in each, a number of times, and reports how many
//! instructions took how many ticks of the time stamp counter in the best of them, and, where the
//! command line says how fast that counts (`tsc_khz=N`), how many that is a second.
#![no_std]
#![no_main]

mod rt;

use rt::{cmdline, report, time, trap};

const ROUNDS: u32 = 8;
/// A round takes this long, or a little more.
const TICKS: u64 = 2_000_000;

fn main() {
    measure("ring0", trap::spin_in_ring0);
    measure("ring3", spin);
}

fn measure(name: &str, spin: impl Fn(u64)) {
    let mut iterations = 100;
    // The host may interrupt any round; the fastest says the most.
    let (mut instructions, mut ticks) = (0, 1);
    for _ in 0..ROUNDS {
        let (done, taken) = round(&mut iterations, &spin);
        if u128::from(done) * u128::from(ticks) > u128::from(instructions) * u128::from(taken) {
            (instructions, ticks) = (done, taken);
        }
    }
    match cmdline::number("tsc_khz") {
        Some(khz) => report::line(format_args!(
            "{name} instructions={instructions} ticks={ticks} per_second={}",
            u128::from(instructions) * u128::from(khz) * 1000 / u128::from(ticks)
        )),
        None => report::line(format_args!("{name} instructions={instructions} ticks={ticks}")),
    }
}

/// How many instructions took how many ticks. Finds out how many iterations are worth a call.
fn round(iterations: &mut u64, spin: impl Fn(u64)) -> (u64, u64) {
    let mut instructions = 0;
    let start = time::ticks();
    loop {
        spin(*iterations);
        instructions += 2 * *iterations;
        let ticks = time::ticks().wrapping_sub(start);
        if ticks >= TICKS {
            return (instructions, ticks);
        }
        if ticks < TICKS / 4 {
            *iterations *= 2;
        }
    }
}

fn spin(iterations: u64) {
    // SAFETY: changes one register.
    unsafe {
        core::arch::asm!("2:", "dec {}", "jnz 2b", inout(reg) iterations => _,
            options(nomem, nostack));
    }
}
