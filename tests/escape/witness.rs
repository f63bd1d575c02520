//! What a guest that does its worst must not do: take memory, fill the log, disturb another.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kiln_selftest_guests::BLOCK;
use kiln_vmm::config::{GuestEnd, VmmEvent};

use crate::process::{Vmm, disk_of, file_of};

/// What a process has in memory beside the guest's, at most, in KiB.
pub const BASE_KIB: u64 = 16 << 10;
/// What a process may log while a guest does its worst, in bytes.
const LOG: usize = 64 << 10;

/// Watches the anonymous memory of processes, which the guest's isn't.
pub struct Meter {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Meter {
    /// Begins.
    pub fn of(pid: u32) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let until = stop.clone();
        let watch = move || {
            let mut most = 0;
            while !until.load(Ordering::Relaxed) {
                most = most.max(anonymous_kib(pid).unwrap_or(0));
                thread::sleep(Duration::from_millis(5));
            }
            most
        };
        Self { stop, thread: thread::spawn(watch) }
    }

    /// The most that there was, in KiB.
    pub fn most(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("measured")
    }
}

fn anonymous_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"))?;
    line.trim().strip_suffix(" kB")?.parse().ok()
}

/// Waits for the guest's end; gives what it said, all of it good.
pub fn all_ok(vmm: &mut Vmm) -> Vec<String> {
    let lines: Vec<String> = std::iter::repeat_with(|| vmm.wait_for_line())
        .take_while(|line| !line.is_empty())
        .map(|line| line.trim().to_owned())
        .collect();
    assert_eq!(vmm.event(), Some(VmmEvent::Ended { how: GuestEnd::Shutdown }), "{lines:#?}");
    assert!(vmm.wait().success(), "{lines:#?}");
    let good = |line: &String| line.starts_with("ok ") || line.starts_with("device ");
    assert!(!lines.is_empty() && lines.iter().all(good), "{lines:#?}");
    lines
}

/// No panic, and no flood of lines.
pub fn said_little(errors: &str) {
    assert!(!errors.contains("panicked"), "{errors}");
    assert!(errors.len() < LOG, "{} bytes: {errors}", errors.len());
}

/// A guest that keeps to the rules, with a disk, again and again until it is told to stop.
pub fn honest_neighbour(stop: mpsc::Receiver<()>) -> JoinHandle<u32> {
    thread::spawn(move || {
        let mut runs = 0;
        while stop.try_recv() == Err(mpsc::TryRecvError::Empty) {
            let numbers: Vec<u8> = (0..1024 * 64u64).flat_map(u64::to_le_bytes).collect();
            let disk = file_of(&numbers);
            let mut vmm = Vmm::start_with(BLOCK.image, 1, |machine| {
                machine.disks.push(disk_of(&disk));
            });
            assert_eq!(vmm.event(), Some(VmmEvent::Running));
            all_ok(&mut vmm);
            runs += 1;
        }
        runs
    })
}
