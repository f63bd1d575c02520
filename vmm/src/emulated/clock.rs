//! The guest's clock under the software CPU.
//!
//! The time stamp counter that QEMU's software CPU shows its guest is the host's own, the same on
//! every vCPU. But the microvm machine has nothing that Linux could calibrate it against in the
//! time it takes, so left alone the guest's clock ticks with the timer interrupt, every 10 ms, and
//! its delay loops are counted out at start, CPU after CPU. So the host measures its counter while it
//! has other things to do, and tells the guest.
//!
//! A host whose counter does not run at one rate (no `constant_tsc` and `nonstop_tsc` among the
//! flags of `/proc/cpuinfo`) tells nothing.

use std::arch::x86_64::_rdtsc;
use std::time::{Duration, Instant};

/// What makes the error of the two clock readings small: some 100 ns of them.
const LEAST: Duration = Duration::from_millis(5);

/// The guest kernel's timer interrupts a second (`CONFIG_HZ`): delay loops are in units of it.
const HZ: u64 = 100;

/// A measurement of the host's time stamp counter.
#[derive(Debug)]
pub struct Meter {
    began: Instant,
    counter: u64,
}

impl Meter {
    /// Begins; `None` if the counter can't serve as a clock.
    pub fn begin() -> Option<Self> {
        let cpu = std::fs::read_to_string("/proc/cpuinfo").ok()?;
        let flags = cpu.lines().find_map(|line| line.strip_prefix("flags"))?;
        let has = |name: &str| flags.split_whitespace().any(|flag| flag == name);
        (has("constant_tsc") && has("nonstop_tsc"))
            .then(|| Self { began: Instant::now(), counter: read() })
    }

    /// Ends after at least 5 ms, and gives the words for the guest kernel's command line.
    pub fn kernel_args(self) -> String {
        std::thread::sleep(LEAST.saturating_sub(self.began.elapsed()));
        let ticks = read().wrapping_sub(self.counter);
        let nanoseconds = self.began.elapsed().as_nanos().max(1);
        let khz = u128::from(ticks) * 1_000_000 / nanoseconds;
        words(u64::try_from(khz).unwrap_or(0))
    }
}

/// `tsc=reliable`: there is no other clock to watch it by. `no_timer_check`: the check that the
/// timer interrupt comes through is one of delay loops.
fn words(khz: u64) -> String {
    let loops_per_jiffy = khz * 1000 / HZ;
    format!("tsc_early_khz={khz} tsc=reliable lpj={loops_per_jiffy} no_timer_check")
}

fn read() -> u64 {
    // SAFETY: an instruction that every x86-64 CPU has and that touches no memory.
    unsafe { _rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_kernels_documentation() {
        let expected = "tsc_early_khz=2600000 tsc=reliable lpj=26000000 no_timer_check";
        assert_eq!(words(2_600_000), expected);
    }

    #[test]
    fn two_measurements_agree() {
        let khz = || {
            let args = Meter::begin()?.kernel_args();
            let word = args.split(' ').next()?.strip_prefix("tsc_early_khz=")?.to_owned();
            word.parse::<u64>().ok()
        };
        // A CPU without a steady counter has nothing to measure.
        let (Some(first), Some(second)) = (khz(), khz()) else { return };
        assert!(first.abs_diff(second) < first / 100, "{first} and {second} kHz");
    }
}
