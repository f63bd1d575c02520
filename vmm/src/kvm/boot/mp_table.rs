//! The MultiProcessor Specification 1.4's tables: how a kernel without ACPI finds its processors
//! and the I/O APIC.
//!
//! Processors have the APIC ids 0 to n-1. Every interrupt line n of the one ISA bus goes to pin n
//! of the I/O APIC, edge-triggered and active high as the bus has it, which is how KVM routes its
//! lines by default and what an irqfd delivers.

use vm_memory::{Bytes, GuestAddress};

use super::BootError;
use crate::GuestMemory;
use crate::kvm::layout;

const SPEC_REVISION: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const FLOATING_POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;

/// Interrupt types of an interrupt assignment entry.
#[derive(Clone, Copy)]
enum InterruptType {
    Vectored = 0,
    NonMaskable = 1,
    ExternalController = 3,
}

/// Writes the tables for `cpus` processors, 1 to 32.
pub(super) fn write(memory: &GuestMemory, cpus: u8) -> Result<(), BootError> {
    let mut bytes = floating_pointer();
    bytes.extend(configuration_table(cpus));
    debug_assert!(bytes.len() as u64 <= layout::BASE_MEMORY_END - layout::MP_TABLE);
    memory
        .write_slice(&bytes, GuestAddress(layout::MP_TABLE))
        .map_err(|_| BootError::MemoryTooSmall("the MP table"))
}

fn floating_pointer() -> Vec<u8> {
    let table = layout::MP_TABLE as u32 + FLOATING_POINTER_SIZE as u32;
    let mut bytes = Vec::with_capacity(1024);
    bytes.extend(b"_MP_");
    bytes.extend(table.to_le_bytes());
    bytes.extend([1, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    bytes[10] = checksum(&bytes);
    bytes
}

fn configuration_table(cpus: u8) -> Vec<u8> {
    let io_apic_id = cpus;
    let mut entries = 0u16;
    let mut body = Vec::new();
    let mut add = |entry: &[u8]| {
        body.extend_from_slice(entry);
        entries += 1;
    };
    for id in 0..cpus {
        add(&processor(id));
    }
    add(&[&[1, ISA_BUS][..], b"ISA   "].concat());
    let io_apic = layout::IO_APIC.to_le_bytes();
    add(&[2, io_apic_id, APIC_VERSION, 1, io_apic[0], io_apic[1], io_apic[2], io_apic[3]]);
    for line in 0..=layout::LAST_IRQ as u8 {
        add(&[3, InterruptType::Vectored as u8, 0, 0, ISA_BUS, line, io_apic_id, line]);
    }
    add(&[4, InterruptType::ExternalController as u8, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[4, InterruptType::NonMaskable as u8, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let mut table = Vec::with_capacity(HEADER_SIZE + body.len());
    table.extend(b"PCMP");
    table.extend(((HEADER_SIZE + body.len()) as u16).to_le_bytes());
    table.extend([SPEC_REVISION, 0]);
    table.extend(b"KILN    ");
    table.extend(b"MICROVM     ");
    table.extend([0; 6]);
    table.extend(entries.to_le_bytes());
    table.extend(layout::LOCAL_APIC.to_le_bytes());
    table.extend([0; 4]);
    table.extend(body);
    table[7] = checksum(&table);
    table
}

fn processor(id: u8) -> [u8; 20] {
    const ENABLED: u8 = 1;
    const BOOT_PROCESSOR: u8 = 2;
    // Family 6, as any processor since the specification; nothing reads it closer than that.
    const SIGNATURE: u32 = 0x600;
    const FPU_AND_APIC: u32 = 0x201;
    let mut entry = [0; 20];
    entry[1] = id;
    entry[2] = APIC_VERSION;
    entry[3] = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
    entry[4..8].copy_from_slice(&SIGNATURE.to_le_bytes());
    entry[8..12].copy_from_slice(&FPU_AND_APIC.to_le_bytes());
    entry
}

/// The byte that makes the sum of all bytes zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tables_sum_to_zero_and_fit_for_every_number_of_processors() {
        for cpus in 1..=32 {
            let pointer = floating_pointer();
            let table = configuration_table(cpus);
            assert_eq!(checksum(&pointer), 0);
            assert_eq!(checksum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            assert!(pointer.len() + table.len() <= 1024, "{cpus} processors");
        }
    }

    #[test]
    fn each_processor_has_an_entry_of_its_own() {
        let table = configuration_table(3);
        let ids: Vec<_> = (0..3).map(|i| table[HEADER_SIZE + i * 20 + 1]).collect();
        assert_eq!(ids, [0, 1, 2]);
        assert_eq!(table[HEADER_SIZE + 3], 3, "the first one boots");
        assert_eq!(table[HEADER_SIZE + 23], 1);
    }
}
