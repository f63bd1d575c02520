//! Has the host raise as many interrupts as it can, from every source at once.
//!
//! The boot CPU goes from device to device, offers each queue the same request again and again and
//! rings its bell, with the fields by which a driver says when it wants to be interrupted set to
//! always, to random places, and to never. The further CPUs, `cpus=N` in all, meanwhile ring all bells
//! (those of queues that are none too), acknowledge what was never raised, write to configuration
//! spaces, interrupt all CPUs, and run the fastest timers there are. With the word
//! `endless` it never ends; else it switches the machine off when every device has been through it.
#![no_std]
#![no_main]

mod attacks;
mod rt;
mod virtio;

use core::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use attacks::raw::{Raw, SIZE};
use attacks::{block, files, frames, sockets};
use rt::report::{check, fail, line};
use rt::{apic, boot, cmdline, port, time, trap};
use virtio::{
    CONFIG, DEVICE_ID, INTERRUPT_ACK, INTERRUPT_STATUS, NEEDS_RESET, QUEUE_NOTIFY, STATUS, Window,
};

/// Where a further CPU begins.
const TRAMPOLINE_PAGE: u8 = 8;

const DEVICE_VECTOR: u8 = 0x90;
const CPU_VECTOR: u8 = 0x60;
const TIMER_VECTOR: u8 = 0x61;
const SERIAL_VECTOR: u8 = 0x62;

/// The serial port's interrupt line.
const SERIAL_LINE: u8 = 4;

/// The ring's feature by which each side says when it wants to be told.
const EVENT_INDEX: u64 = 1 << 29;

/// How often each bell is rung in each of the ways.
const ROUNDS: u16 = 200;

static STOP: AtomicBool = AtomicBool::new(false);
/// Further CPUs that have stopped.
static STOPPED: AtomicU64 = AtomicU64::new(0);

fn main() {
    apic::enable();
    let cpus = cmdline::number("cpus").unwrap_or(1);
    for window in virtio::windows() {
        apic::route(window.line, DEVICE_VECTOR + window.line);
    }
    apic::route(SERIAL_LINE, SERIAL_VECTOR);
    trap::enable_interrupts();
    begin_others(cpus);
    apic::start_periodic_timer(TIMER_VECTOR, 1);
    line(format_args!("ok storming"));
    loop {
        for window in virtio::windows() {
            device(window);
        }
        if !cmdline::words().any(|word| word == "endless") {
            break;
        }
    }
    STOP.store(true, Ordering::SeqCst);
    let quiet = || STOPPED.load(Ordering::SeqCst) + 1 == cpus;
    check("calm", time::wait_until(quiet), format_args!("a CPU goes on"));
    let came = trap::interrupts(TIMER_VECTOR) > 0;
    check("timer", came, format_args!("it never interrupted"));
    for (name, vector) in [("CPU", CPU_VECTOR), ("serial", SERIAL_VECTOR)] {
        // Without further CPUs there is nobody who has them interrupt.
        let came = cpus == 1 || trap::interrupts(vector) > 0;
        check(name, came, format_args!("it never interrupted"));
    }
}

fn begin_others(cpus: u64) {
    rt::on_startup(further_cpu);
    let code = boot::trampoline();
    let page = (usize::from(TRAMPOLINE_PAGE) << 12) as *mut u8;
    // SAFETY: low memory, which the loader has no use for any more.
    unsafe { page.copy_from_nonoverlapping(code.as_ptr(), code.len()) };
    for id in 1..cpus {
        apic::start_cpu(id as u8, TRAMPOLINE_PAGE);
        let started = time::wait_until(|| boot::cpus() == id + 1);
        if !started {
            fail("start of a CPU", format_args!("CPU {id} does not start"));
        }
    }
}

fn further_cpu() -> ! {
    apic::enable();
    trap::enable_interrupts();
    apic::start_periodic_timer(TIMER_VECTOR, 1);
    let mut turn = 0u32;
    while !STOP.load(Ordering::SeqCst) {
        turn = turn.wrapping_add(1);
        for window in virtio::windows() {
            window.write(QUEUE_NOTIFY, turn % 5);
            window.write(QUEUE_NOTIFY, turn.rotate_left(24));
            window.write(INTERRUPT_ACK, turn);
            window.write(INTERRUPT_STATUS, u32::MAX);
            window.write(CONFIG + u64::from(turn % 64) * 4, turn);
        }
        // The transmitter's interrupt, off and on: the transmitter is always ready.
        port::write8(0x3f9, 0);
        port::write8(0x3f9, 2);
        for id in 0..boot::cpus() {
            apic::interrupt(id as u8, CPU_VECTOR);
        }
    }
    trap::disable_interrupts();
    STOPPED.fetch_add(1, Ordering::SeqCst);
    trap::park()
}

/// Rings the bell of each of a device's queues, with something in the queue.
fn device(window: Window) {
    let id = window.read(DEVICE_ID);
    line(format_args!("device {id}"));
    for (name, event_index) in [("each chain", false), ("any place", true)] {
        let features = if event_index { EVENT_INDEX } else { 0 };
        if !attacks::begin(window, features) {
            return fail(name, format_args!("device {id} does not begin"));
        }
        let queues = attacks::queues(window);
        (0..queues).for_each(|queue| request(Raw::of(queue), id, queue));
        let before = trap::interrupts(DEVICE_VECTOR + window.line);
        for round in 0..ROUNDS {
            for queue in 0..queues {
                let raw = Raw::of(queue);
                // As many as the queue holds; what the device has not used yet counts.
                if raw.available().wrapping_sub(raw.used()) < SIZE {
                    raw.offer(0);
                }
                raw.set_used_event(match round % 4 {
                    0 => raw.used(),
                    1 => raw.used().wrapping_sub(1),
                    2 => round.wrapping_mul(0x9e37),
                    _ => raw.used().wrapping_add(1 << 15),
                });
                raw.set_available_flags(round & 1);
                window.write(QUEUE_NOTIFY, queue);
                window.write(INTERRUPT_ACK, window.read(INTERRUPT_STATUS));
            }
        }
        let broken = window.read(STATUS) & NEEDS_RESET != 0;
        check(name, !broken, format_args!("device {id} has given up"));
        // A bell is not waited for: the last of what it brings may be on its way.
        let came = || trap::interrupts(DEVICE_VECTOR + window.line) != before;
        check(name, time::wait_until(came), format_args!("device {id} never interrupted"));
    }
    // The next device has the same memory for its queues.
    check("reset", window.reset(), format_args!("device {id} does not reset"));
}

/// Describes a request that a queue's device serves at once, as often as it is offered.
fn request(raw: Raw, device: u32, queue: u32) {
    let buffer = raw.buffer();
    match (device, queue) {
        // A sector read.
        (block::DEVICE_ID, _) => {
            raw.put(0, &[0; 16]);
            let data = buffer + 4096;
            raw.chain(&[(buffer, 16, false), (data, 512, true), (data + 512, 1, true)]);
        }
        // A frame of zeroes.
        (frames::DEVICE_ID, 1) => {
            raw.put(0, &[0; 72]);
            raw.chain(&[(buffer, 72, false)]);
        }
        // A packet of an operation that is none, from nowhere.
        (sockets::DEVICE_ID, 1) => {
            raw.put(0, &[0; 44]);
            raw.chain(&[(buffer, 44, false)]);
        }
        // A request of an operation that is none.
        (files::DEVICE_ID, _) => {
            raw.put(0, &[0; 40]);
            raw.put(0, &40u32.to_le_bytes());
            raw.put(4, &9999u32.to_le_bytes());
            raw.chain(&[(buffer, 40, false), (buffer + 4096, 4096, true)]);
        }
        // Room for what the host has: entropy, memory to be given back, frames and packets.
        _ => raw.chain(&[(buffer.next_multiple_of(4096), 4096, true)]),
    }
}
