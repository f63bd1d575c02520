//! A driver that keeps to no rule: it sends every device what is malformed, in its registers, its
//! rings and its requests, and looks whether the device is as good as new after a reset each time.
//!
//! `memory_mib=N` says where memory ends, `vsock_port=PORT` the one port of the host. With the word
//! `race` a second CPU changes descriptors while devices read them.
#![no_std]
#![no_main]

mod attacks;
mod rt;
mod virtio;

use attacks::{block, files, frames, race, registers, rings, sockets};
use rt::report::{check, fail, line};
use rt::{apic, cmdline, trap};
use virtio::DEVICE_ID;

fn main() {
    apic::enable();
    trap::enable_interrupts();
    let mut devices = 0;
    for window in virtio::windows() {
        let id = window.read(DEVICE_ID);
        line(format_args!("device {id}"));
        registers::attack(window);
        rings::attack(window, id);
        match id {
            frames::DEVICE_ID => frames::attack(window),
            block::DEVICE_ID => block::attack(window),
            sockets::DEVICE_ID => sockets::attack(window),
            files::DEVICE_ID => files::attack(window),
            _ => {}
        }
        check("reset", window.reset(), format_args!("device {id} does not reset"));
        devices += 1;
    }
    if devices == 0 {
        fail("devices", format_args!("there is none"));
    }
    if cmdline::words().any(|word| word == "race") {
        race::start();
        virtio::windows().for_each(race::attack);
    }
}
