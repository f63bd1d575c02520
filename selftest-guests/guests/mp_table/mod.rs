//! The MultiProcessor Specification's table of CPUs (version 1.4, chapter 4).

const SIGNATURE: &[u8; 4] = b"_MP_";
/// Where the floating pointer structure may be: the last KiB of base memory, the BIOS area.
const AREAS: [(u64, u64); 2] = [(0x9_fc00, 0xa_0000), (0xf_0000, 0x10_0000)];
const POINTER_SIZE: usize = 16;
const HEADER_SIZE: usize = 44;
const PROCESSOR: u8 = 0;
const PROCESSOR_SIZE: usize = 20;
const OTHER_SIZE: usize = 8;
const ENABLED: u8 = 1;

/// How many CPUs the table names as usable.
pub fn cpus() -> Result<u8, &'static str> {
    let pointer = AREAS
        .into_iter()
        .flat_map(|(start, end)| (start..end).step_by(POINTER_SIZE))
        .map(|address| bytes(address, POINTER_SIZE))
        .find(|bytes| bytes.starts_with(SIGNATURE))
        .ok_or("there is none")?;
    if sum(pointer) != 0 {
        return Err("its pointer's checksum is wrong");
    }
    let [.., a, b, c, d] = pointer[..8] else { return Err("unreachable") };
    let address = u64::from(u32::from_le_bytes([a, b, c, d]));
    let header = bytes(address, HEADER_SIZE);
    if !header.starts_with(b"PCMP") {
        return Err("its signature is wrong");
    }
    let table = bytes(address, u16::from_le_bytes([header[4], header[5]]).into());
    if sum(table) != 0 {
        return Err("its checksum is wrong");
    }
    let mut entries = table.get(HEADER_SIZE..).ok_or("it is too short")?;
    let mut cpus = 0;
    while let Some(kind) = entries.first() {
        let size = if *kind == PROCESSOR { PROCESSOR_SIZE } else { OTHER_SIZE };
        let (entry, rest) = entries.split_at_checked(size).ok_or("an entry is cut off")?;
        cpus += u8::from(*kind == PROCESSOR && entry[3] & ENABLED != 0);
        entries = rest;
    }
    Ok(cpus)
}

fn bytes(address: u64, length: usize) -> &'static [u8] {
    // SAFETY: low memory, mapped one to one; nobody writes to it while the table is read.
    unsafe { core::slice::from_raw_parts(address as *const u8, length) }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}
