//! Guests of a few instructions, run for real.

mod image;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};

use super::*;
use crate::config::{Entry, GuestEnd};
use image::Image;

fn vm() -> Vm {
    let kvm = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .expect("these tests need /dev/kvm");
    Vm::create(kvm.into()).unwrap()
}

fn machine(cpus: u8) -> Machine {
    Machine::new(vm(), 8, cpus).unwrap()
}

fn kernel(image: &Image, entry: Entry) -> Kernel {
    Kernel { image: image.file(), initrd: None, cmdline: "a=b".into(), entry }
}

fn run_64(code: &[u8]) -> GuestEnd {
    let mut machine = machine(1);
    machine.boot(kernel(&Image::new(code), Entry::Linux64)).unwrap();
    machine.run().unwrap()
}

/// `mov dx, 0x501; out dx, al`
const POWER_OFF: [u8; 5] = [0x66, 0xba, 0x01, 0x05, 0xee];

#[test]
fn a_guest_powers_off_from_the_64_bit_entry() {
    assert_eq!(run_64(&POWER_OFF), GuestEnd::Shutdown);
}

#[test]
fn a_guest_powers_off_from_the_pvh_entry() {
    // cmp dword [ebx], 0x336ec578; jne +5; (mov dx, 0x501; out dx, al in 32-bit code); ud2
    let mut code = vec![0x81, 0x3b, 0x78, 0xc5, 0x6e, 0x33, 0x75, 0x05];
    code.extend(POWER_OFF);
    code.extend([0x0f, 0x0b]);
    let image = Image::new(&code).with_pvh_note();
    for entry in [Entry::Pvh, Entry::Auto] {
        let mut machine = machine(1);
        machine.boot(kernel(&image, entry)).unwrap();
        assert_eq!(machine.run().unwrap(), GuestEnd::Shutdown, "{entry:?}");
    }
}

#[test]
fn a_kernel_without_the_note_has_no_pvh_entry() {
    let mut machine = machine(1);
    let error = machine.boot(kernel(&Image::new(&POWER_OFF), Entry::Pvh)).unwrap_err();
    assert!(matches!(error, KvmError::Boot(BootError::NoPvhEntry)), "{error}");
}

#[test]
fn a_guest_resets_through_the_keyboard_controller() {
    // mov al, 0xfe; out 0x64, al
    assert_eq!(run_64(&[0xb0, 0xfe, 0xe6, 0x64]), GuestEnd::Reset);
}

#[test]
fn a_fault_without_handlers_is_a_triple_fault() {
    // ud2
    assert_eq!(run_64(&[0x0f, 0x0b]), GuestEnd::TripleFault);
}

#[test]
fn the_64_bit_entry_has_the_zero_page_in_rsi() {
    // cmp word [rsi + 0x1fe], 0xaa55; je +2; ud2
    let mut code = vec![0x66, 0x81, 0xbe, 0xfe, 0x01, 0, 0, 0x55, 0xaa, 0x74, 0x02, 0x0f, 0x0b];
    code.extend(POWER_OFF);
    assert_eq!(run_64(&code), GuestEnd::Shutdown);
}

#[test]
fn nowhere_reads_as_all_ones() {
    // mov ebx, 0xe0000000; mov [rbx], eax; mov eax, [rbx]; cmp eax, -1; je +2; ud2
    let mut code = vec![0xbb, 0, 0, 0, 0xe0, 0x89, 0x03, 0x8b, 0x03, 0x83, 0xf8, 0xff];
    code.extend([0x74, 0x02, 0x0f, 0x0b]);
    code.extend(POWER_OFF);
    assert_eq!(run_64(&code), GuestEnd::Shutdown);
}

#[test]
fn the_serial_port_writes_to_its_output() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let mut machine = machine(1);
    machine.add_serial(None, Some(OwnedFd::from(writer))).unwrap();
    // mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al
    let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee];
    code.extend(POWER_OFF);
    machine.boot(kernel(&Image::new(&code), Entry::Linux64)).unwrap();
    assert_eq!(machine.run().unwrap(), GuestEnd::Shutdown);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hi");
}

#[test]
fn the_serial_port_reads_its_input() {
    use std::io::Write;

    let (reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"q").unwrap();
    let mut machine = machine(1);
    machine.add_serial(Some(OwnedFd::from(reader)), None).unwrap();
    // mov dx, 0x3fd; wait: in al, dx; test al, 1; jz wait; mov dx, 0x3f8; in al, dx;
    // cmp al, 'q'; je +2; ud2
    let mut code = vec![0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01, 0x74, 0xfb];
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xec, 0x3c, b'q', 0x74, 0x02, 0x0f, 0x0b]);
    code.extend(POWER_OFF);
    machine.boot(kernel(&Image::new(&code), Entry::Linux64)).unwrap();
    assert_eq!(machine.run().unwrap(), GuestEnd::Shutdown);
}

/// `jmp $`
const FOR_EVER: [u8; 2] = [0xeb, 0xfe];

#[test]
fn a_guest_that_never_ends_is_stopped() {
    let mut machine = machine(4);
    machine.boot(kernel(&Image::new(&FOR_EVER), Entry::Linux64)).unwrap();
    let stopper = machine.stopper();
    let running = std::thread::spawn(|| machine.run());
    stopper.stop();
    assert!(matches!(running.join().unwrap(), Err(KvmError::Stopped)));
}

#[test]
fn a_monitor_that_hangs_up_stops_its_guest() {
    let (monitor, control) = std::os::unix::net::UnixStream::pair().unwrap();
    let mut machine = machine(2);
    machine.boot(kernel(&Image::new(&FOR_EVER), Entry::Linux64)).unwrap();
    let running = std::thread::spawn(move || machine.run_until(Until::HangUp(control.as_fd())));
    drop(monitor);
    assert!(matches!(running.join().unwrap(), Err(KvmError::Stopped)));
}

#[test]
fn every_processor_is_announced_and_waits_for_its_start() {
    // The first processor sends INIT and then start-up IPIs to all others, whose code at 0x8000
    // (real mode) counts itself and halts; it powers off when 3 have. Low memory is one to one.
    #[rustfmt::skip]
    let code = [
        // lea rsi, [rip + trampoline]; mov edi, 0x8000; mov ecx, 16; rep movsb
        0x48, 0x8d, 0x35, 0x3e, 0, 0, 0, 0xbf, 0x00, 0x80, 0, 0, 0xb9, 16, 0, 0, 0, 0xf3, 0xa4,
        // mov ebx, 0xfee00000
        0xbb, 0x00, 0x00, 0xe0, 0xfe,
        // mov dword [rbx + 0xf0], 0x1ff (enable the local APIC)
        0xc7, 0x83, 0xf0, 0, 0, 0, 0xff, 0x01, 0, 0,
        // mov dword [rbx + 0x300], 0xc4500 (INIT, all but self)
        0xc7, 0x83, 0x00, 0x03, 0, 0, 0x00, 0x45, 0x0c, 0x00,
        // mov dword [rbx + 0x300], 0xc4608 (start-up at 0x8000)
        0xc7, 0x83, 0x00, 0x03, 0, 0, 0x08, 0x46, 0x0c, 0x00,
        // wait: cmp byte [0x8800], 3; jb wait
        0x80, 0x3c, 0x25, 0x00, 0x88, 0, 0, 3, 0x72, 0xf6,
    ];
    let mut code = code.to_vec();
    code.extend(POWER_OFF);
    // In real mode at 0x800:0: lock inc byte cs:[0x800]; cli; hlt; jmp -3
    let trampoline = [0x2e, 0xf0, 0xfe, 0x06, 0x00, 0x08, 0xfa, 0xf4, 0xeb, 0xfd];
    assert_eq!(code.len(), 7 + 0x3e, "the address of the trampoline");
    code.extend(trampoline);
    code.extend([0; 16]);
    let mut machine = machine(4);
    machine.boot(kernel(&Image::new(&code), Entry::Linux64)).unwrap();
    assert_eq!(machine.run().unwrap(), GuestEnd::Shutdown);
}

#[test]
fn what_kvm_cannot_run_is_shown_to_the_hook_and_then_described() {
    // A far jump through memory that is none makes no exit; an instruction fetch from a device does.
    // mov eax, 0xe0000000; jmp rax
    let code = [0xb8, 0, 0, 0, 0xe0, 0xff, 0xe0];
    let mut machine = machine(1);
    let seen = std::sync::Arc::new(std::sync::atomic::AtomicU32::new(0));
    let seen_by_hook = seen.clone();
    machine.set_exit_hook(Box::new(move |_| {
        seen_by_hook.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        false
    }));
    machine.boot(kernel(&Image::new(&code), Entry::Linux64)).unwrap();
    let end = machine.run().unwrap();
    let GuestEnd::Broken { reason, registers } = end else { panic!("{end:?}") };
    assert!(reason.starts_with("KVM_EXIT_INTERNAL_ERROR"), "{reason}");
    assert!(registers.iter().any(|line| line.contains("rip 00000000e0000000")), "{registers:#?}");
    assert_eq!(seen.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[test]
fn sizes_no_machine_can_have_are_refused() {
    assert!(matches!(Machine::new(vm(), 8, 0), Err(KvmError::Cpus(0))));
    assert!(matches!(Machine::new(vm(), 8, 33), Err(KvmError::Cpus(33))));
}

#[test]
fn what_is_no_kvm_is_refused() {
    let file = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Vm::create(file.into()), Err(KvmError::Unsupported(_))));
}
