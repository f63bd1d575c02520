//! The kernel command line.

use super::boot::Entry;

const MAX_LENGTH: usize = 4096;
/// `hdr.cmd_line_ptr` in Linux's boot parameters (Documentation/arch/x86/zero-page.rst).
const LINUX_CMDLINE: u64 = 0x228;
/// `cmdline_paddr` in PVH's start info (Xen's hvm/start_info.h).
const PVH_CMDLINE: u64 = 24;

static mut CMDLINE: [u8; MAX_LENGTH] = [0; MAX_LENGTH];

/// Copies the command line away from where the loader left it.
pub fn copy(entry: Entry, parameters: u64) {
    // SAFETY: the loader's structure, mapped one to one; both fields are aligned.
    let from = unsafe {
        match entry {
            Entry::Pvh => ((parameters + PVH_CMDLINE) as *const u64).read(),
            _ => u64::from(((parameters + LINUX_CMDLINE) as *const u32).read()),
        }
    } as *const u8;
    if from.is_null() {
        return;
    }
    for index in 0..MAX_LENGTH - 1 {
        // SAFETY: the loader ends the string with a zero; only the boot CPU runs, and only once.
        unsafe {
            let byte = from.add(index).read();
            if byte == 0 {
                return;
            }
            (&raw mut CMDLINE).cast::<u8>().add(index).write(byte);
        }
    }
}

/// The words of the command line.
pub fn words() -> impl Iterator<Item = &'static str> {
    // SAFETY: nobody writes to it after `copy`.
    let all: &'static [u8; MAX_LENGTH] = unsafe { &*(&raw const CMDLINE) };
    let length = all.iter().position(|byte| *byte == 0).unwrap_or(0);
    str::from_utf8(&all[..length]).unwrap_or("").split_ascii_whitespace()
}

/// The values of all words `key=value`, in order.
pub fn values(key: &'static str) -> impl Iterator<Item = &'static str> {
    words().filter_map(move |word| word.strip_prefix(key)?.strip_prefix('='))
}

/// The number that a word `key=number` gives.
pub fn number(key: &'static str) -> Option<u64> {
    values(key).next()?.parse().ok()
}

/// A number as the kernel reads it: hexadecimal after `0x`, with a suffix `K` or `M`.
pub fn parse_size(text: &str) -> Option<u64> {
    let (text, factor) = match text.as_bytes().last()? {
        b'K' | b'k' => (&text[..text.len() - 1], 1 << 10),
        b'M' | b'm' => (&text[..text.len() - 1], 1 << 20),
        _ => (text, 1),
    };
    let number = match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok()?,
        None => text.parse().ok()?,
    };
    number.checked_mul(factor)
}
