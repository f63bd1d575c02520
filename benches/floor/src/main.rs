//! The least that a program can do to run a guest: `kiln-bench-floor GUEST`.
//!
//! It opens `/dev/kvm`, makes a machine with an interrupt controller, one vCPU and 128 MiB, loads
//! the guest (an x86-64 ELF), enters it in long mode and serves it a serial port on stdout until it
//! ends. No devices, no jail, no second process, no checks that the bench doesn't need: starting
//! kiln's machine is measured against this.
//!
//! Exit status: 0 after a shutdown or a reset, 3 after a triple fault, 1 when something failed.

mod image;

use std::io::Write;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result, bail};
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};

const MEMORY: usize = 128 << 20;
/// Three pages of KVM's own, below 4 GiB where no guest memory is.
const KVM_TSS: usize = 0xfffb_d000;

/// Page tables: the first GiB, one to one.
const PML4: usize = 0x9000;
const PDPT: usize = 0xa000;
const PD: usize = 0xb000;
/// Linux's boot parameters, and in them where the command line's address stands.
const BOOT_PARAMS: usize = 0x7000;
const CMDLINE_POINTER: usize = BOOT_PARAMS + 0x228;
const CMDLINE: usize = 0x2_0000;

const SERIAL: u16 = 0x3f8;
const SERIAL_STATUS: u16 = SERIAL + 5;
const TRANSMITTER_EMPTY: u8 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const RESET: u8 = 0xfe;
const POWER_OFF: u16 = 0x501;

fn main() -> Result<()> {
    let mut arguments = std::env::args_os().skip(1);
    let path = arguments.next().context("usage: kiln-bench-floor GUEST [CMDLINE]")?;
    let cmdline = arguments.next().unwrap_or_default();
    let guest = std::fs::read(&path).with_context(|| format!("can't read {}", path.display()))?;

    let kvm = Kvm::new().context("can't open /dev/kvm")?;
    let vm = kvm.create_vm().context("can't create a machine")?;
    vm.set_tss_address(KVM_TSS).context("can't set the TSS address")?;
    vm.create_irq_chip().context("can't create the interrupt controllers")?;

    // SAFETY: a new private mapping, of the process until it ends.
    let memory = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            MEMORY,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
            0,
        )
    };
    if memory == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error()).context("can't map guest memory");
    }
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: memory as u64,
    };
    // SAFETY: the mapping lives as long as the process.
    unsafe { vm.set_user_memory_region(region) }.context("can't give memory to the machine")?;
    // SAFETY: this process made the mapping and the guest isn't running yet.
    let bytes = unsafe { std::slice::from_raw_parts_mut(memory.cast::<u8>(), MEMORY) };
    let entry = image::load(&guest, bytes)?;
    write_tables(bytes, cmdline.as_encoded_bytes())?;

    let mut vcpu = vm.create_vcpu(0).context("can't create a vCPU")?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("can't get CPUID")?;
    vcpu.set_cpuid2(&cpuid).context("can't set CPUID")?;
    set_registers(&vcpu, entry)?;
    let status = run(&mut vcpu)?;
    std::process::exit(status)
}

fn write_tables(memory: &mut [u8], cmdline: &[u8]) -> Result<()> {
    let mut write =
        |at: usize, value: u64| memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    write(PML4, PDPT as u64 | 3);
    write(PDPT, PD as u64 | 3);
    for index in 0..512 {
        write(PD + 8 * index, (index as u64) << 21 | 0x83);
    }
    write(CMDLINE_POINTER, CMDLINE as u64);
    let Some(room) = memory.get_mut(CMDLINE..CMDLINE + cmdline.len()) else {
        bail!("the command line is too long");
    };
    room.copy_from_slice(cmdline);
    Ok(())
}

/// The 64-bit Linux boot protocol's state (Documentation/arch/x86/boot.rst).
fn set_registers(vcpu: &VcpuFd, entry: u64) -> Result<()> {
    let mut special = vcpu.get_sregs().context("can't get the special registers")?;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x10,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..kvm_segment::default()
    };
    let data = kvm_segment { selector: 0x18, type_: 3, l: 0, db: 1, ..code };
    special.cs = code;
    (special.ds, special.es, special.ss) = (data, data, data);
    special.cr3 = PML4 as u64;
    special.cr4 = 1 << 5;
    special.cr0 = 0x8000_0011;
    special.efer = 0x500;
    vcpu.set_sregs(&special).context("can't set the special registers")?;
    let general =
        kvm_regs { rip: entry, rsi: BOOT_PARAMS as u64, rflags: 2, ..kvm_regs::default() };
    vcpu.set_regs(&general).context("can't set the registers")
}

/// Runs the guest to its end and gives the exit status.
fn run(vcpu: &mut VcpuFd) -> Result<i32> {
    let mut stdout = std::io::stdout().lock();
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(POWER_OFF, _) | VcpuExit::IoOut(KEYBOARD_COMMAND, [RESET])) => {
                return Ok(0);
            }
            Ok(VcpuExit::IoOut(SERIAL, data)) => stdout.write_all(data)?,
            Ok(VcpuExit::IoOut(_, _) | VcpuExit::MmioWrite(_, _)) => {}
            Ok(VcpuExit::IoIn(SERIAL_STATUS, data)) => data.fill(TRANSMITTER_EMPTY),
            Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(0xff),
            Ok(VcpuExit::Shutdown) => return Ok(3),
            Ok(exit) => {
                let exit = format!("{exit:?}");
                let registers = vcpu.get_regs().context("can't get the registers")?;
                bail!("vCPU {} ended: {exit} {registers:x?}", vcpu.as_raw_fd());
            }
            Err(error) if error.errno() == libc::EINTR => {}
            Err(error) => return Err(error).context("can't run the vCPU"),
        }
    }
}
