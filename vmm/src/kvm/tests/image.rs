//! ELF images around a few instructions.

use std::fs::File;
use std::io::Write;

use crate::kvm::layout;

/// Where the code is loaded and entered.
pub(super) const LOAD_ADDRESS: u64 = layout::KERNEL_START;

const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// An ELF image, section by section.
#[derive(Clone)]
pub(super) struct Image {
    code: Vec<u8>,
    note: Option<Vec<u8>>,
    /// Physical address of the code.
    pub address: u64,
    /// Entry point.
    pub entry: u64,
    /// `e_machine`.
    pub machine: u16,
}

impl Image {
    pub fn new(code: &[u8]) -> Self {
        let address = LOAD_ADDRESS;
        Self { code: code.to_vec(), note: None, address, entry: address, machine: 62 }
    }

    /// Adds the note that announces the PVH entry, at the beginning of the code.
    pub fn with_pvh_note(mut self) -> Self {
        const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;
        let words = [4, 4, XEN_ELFNOTE_PHYS32_ENTRY];
        let mut note: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        note.extend(b"Xen\0");
        note.extend((self.address as u32).to_le_bytes());
        self.note = Some(note);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let note = self.note.clone().unwrap_or_default();
        let headers = if self.note.is_some() { 2 } else { 1 };
        let note_at = HEADER_SIZE + headers * PROGRAM_HEADER_SIZE;
        let code_at = note_at + note.len();
        let mut bytes = b"\x7fELF\x02\x01\x01".to_vec();
        bytes.resize(16, 0);
        bytes.extend(2u16.to_le_bytes());
        bytes.extend(self.machine.to_le_bytes());
        bytes.extend(1u32.to_le_bytes());
        bytes.extend(self.entry.to_le_bytes());
        bytes.extend((HEADER_SIZE as u64).to_le_bytes());
        bytes.extend([0; 12]);
        bytes.extend((HEADER_SIZE as u16).to_le_bytes());
        bytes.extend((PROGRAM_HEADER_SIZE as u16).to_le_bytes());
        bytes.extend((headers as u16).to_le_bytes());
        bytes.extend([0; 6]);
        bytes.extend(program_header(PT_LOAD, code_at, self.address, self.code.len()));
        if self.note.is_some() {
            bytes.extend(program_header(PT_NOTE, note_at, 0, note.len()));
        }
        bytes.extend(&note);
        bytes.extend(&self.code);
        bytes
    }

    pub fn file(&self) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&self.bytes()).unwrap();
        file
    }
}

fn program_header(kind: u32, offset: usize, address: u64, size: usize) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend(7u32.to_le_bytes());
    for field in [offset as u64, address, address, size as u64, size as u64, 0x10] {
        bytes.extend(field.to_le_bytes());
    }
    bytes
}
