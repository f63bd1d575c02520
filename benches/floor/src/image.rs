//! Loads an x86-64 ELF image.

use anyhow::{Context, Result, ensure};

const LOADABLE: u32 = 1;

/// Copies the loadable segments to their physical addresses and gives the entry point.
///
/// # Errors
/// The file isn't a 64-bit little-endian ELF, or a segment lies outside of the file or of memory.
pub fn load(file: &[u8], memory: &mut [u8]) -> Result<u64> {
    ensure!(file.starts_with(b"\x7fELF\x02\x01"), "the guest is not a 64-bit little-endian ELF");
    let entry = number(file, 24, 8)?;
    let (table, size, count) = (number(file, 32, 8)?, number(file, 54, 2)?, number(file, 56, 2)?);
    for index in 0..count {
        let header = table.saturating_add(index * size);
        if number(file, header, 4)? != u64::from(LOADABLE) {
            continue;
        }
        let offset = number(file, header.saturating_add(8), 8)?;
        let address = number(file, header.saturating_add(24), 8)?;
        let length = number(file, header.saturating_add(32), 8)?;
        let from = range(offset, length).and_then(|range| file.get(range));
        let to = range(address, length).and_then(|range| memory.get_mut(range));
        let from = from.context("a segment lies outside of the file")?;
        to.context("a segment lies outside of memory")?.copy_from_slice(from);
    }
    Ok(entry)
}

fn number(file: &[u8], at: u64, size: u64) -> Result<u64> {
    let bytes = range(at, size).and_then(|range| file.get(range));
    let bytes = bytes.context("the guest is cut off")?;
    Ok(bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
}

fn range(start: u64, length: u64) -> Option<std::ops::Range<usize>> {
    let start = usize::try_from(start).ok()?;
    Some(start..start.checked_add(usize::try_from(length).ok()?)?)
}
