//! Descriptors that change while a device reads them: what was checked isn't what is used.

use core::sync::atomic::{AtomicU64, Ordering};

use crate::attacks::raw::{Descriptor, NEXT, Raw, WRITE};
use crate::attacks::{begin, memory_end, queues};
use crate::rt::report::{check, fail};
use crate::rt::{apic, boot, time};
use crate::virtio::{NEEDS_RESET, QUEUE_NOTIFY, STATUS, Window};

/// Where a further CPU begins.
const TRAMPOLINE_PAGE: u8 = 8;

/// The queue whose descriptors are being changed, and one more.
static QUEUE: AtomicU64 = AtomicU64::new(0);

/// Starts the second CPU, which changes descriptors from then on.
pub fn start() {
    crate::rt::on_startup(change);
    let code = boot::trampoline();
    let page = (usize::from(TRAMPOLINE_PAGE) << 12) as *mut u8;
    // SAFETY: low memory, which the loader has no use for any more.
    unsafe { page.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    apic::start_cpu(1, TRAMPOLINE_PAGE);
    check("second CPU", time::wait_until(|| boot::cpus() == 2), format_args!("it does not start"));
}

fn change() -> ! {
    let mut turn = 0u64;
    loop {
        let Some(queue) = QUEUE.load(Ordering::Relaxed).checked_sub(1) else {
            core::hint::spin_loop();
            continue;
        };
        let raw = Raw::of(queue as u32);
        turn = turn.wrapping_add(1);
        let address = [raw.buffer(), memory_end() - 8, 1 << 40, u64::MAX - 8][turn as usize % 4];
        let length = [16, u32::MAX, 0, 4096][turn as usize / 4 % 4];
        let flags = [0, NEXT, WRITE, NEXT | WRITE][turn as usize / 16 % 4];
        let next = [1, 0, u16::MAX, 15][turn as usize / 64 % 4];
        raw.describe((turn % 3) as u16, Descriptor { address, length, flags, next });
    }
}

pub fn attack(window: Window) {
    for queue in 0..queues(window) {
        for _ in 0..20 {
            if !begin(window, 0) {
                return fail("race", format_args!("the device does not begin"));
            }
            let raw = Raw::of(queue);
            raw.chain(&[(raw.buffer(), 16, false), (raw.buffer(), 512, true)]);
            QUEUE.store(u64::from(queue) + 1, Ordering::SeqCst);
            for _ in 0..20 {
                raw.offer(0);
                window.write(QUEUE_NOTIFY, queue);
                if window.read(STATUS) & NEEDS_RESET != 0 {
                    break;
                }
            }
            QUEUE.store(0, Ordering::SeqCst);
        }
    }
    check("race", window.reset(), format_args!("the device does not reset"));
}
