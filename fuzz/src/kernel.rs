//! Loading a kernel.

use std::fs::File;
use std::io::Write;

use kiln_vmm::fuzzing::load_kernel;
use vm_memory::GuestAddress;

/// Memory in bytes: what lies below the kernel, and room for a small one.
const MEMORY: usize = 2 << 20;

/// The input is the kernel file.
pub fn load(bytes: &[u8]) {
    let file = rustix::fs::memfd_create("kernel", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(file.expect("a file"));
    file.write_all(bytes).expect("written");
    let memory = [(GuestAddress(0), MEMORY)];
    let memory = kiln_vmm::GuestMemory::from_ranges(&memory).expect("memory");
    let _ = load_kernel(&memory, file);
}
