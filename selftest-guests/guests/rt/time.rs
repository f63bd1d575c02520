//! Time, by the time stamp counter. Its rate is unknown; at 1 to 5 GHz the limits here are good to
//! a factor of five, which is enough to end a wait that nothing will end.

/// The counter.
pub fn ticks() -> u64 {
    // SAFETY: every x86-64 processor has it and nothing here turns it off.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Waits until `done`, for a minute or so at most: the host may be busy. Whether it is done.
pub fn wait_until(mut done: impl FnMut() -> bool) -> bool {
    const LIMIT: u64 = 200_000_000_000;
    let start = ticks();
    while !done() {
        if ticks().wrapping_sub(start) > LIMIT {
            return done();
        }
        core::hint::spin_loop();
    }
    true
}

/// Lets some time pass: at least `ticks` ticks.
pub fn pause(ticks_to_pass: u64) {
    let start = ticks();
    while ticks().wrapping_sub(start) < ticks_to_pass {
        core::hint::spin_loop();
    }
}
