//! What fuzzers call: parsers that are nobody else's business, with as little around them as they
//! can run with.

use std::fs::File;
use std::io;
use std::path::Path;

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtiofsd::descriptor_utils::{Reader, Writer};
use vm_memory::GuestMemoryMmap;

use crate::GuestMemory;
use crate::config::Entry;
use crate::kvm::boot::{self, BootError, EntryPoint, Kernel};
use crate::virtio::fs::request::RequestServer;
use crate::virtio::fs::{Space, file_system_at};

/// Files that the fuzzed file system process may have open.
const OPEN_FILES: u64 = 256;

/// What the fuzzed guest may add, in bytes.
pub const SPACE: u64 = 64 << 10;

/// Guest memory as `kiln fs` has it.
pub type SharedMemory = GuestMemoryMmap<BitmapMmapRegion>;

/// Loads a kernel into memory, for one processor.
///
/// # Errors
/// It is none.
pub fn load_kernel(memory: &GuestMemory, image: File) -> Result<EntryPoint, BootError> {
    let kernel = Kernel { image, initrd: None, cmdline: String::new(), entry: Entry::Auto };
    boot::load(memory, kernel, 1)
}

/// The FUSE server of `kiln fs`, on a directory and in no jail.
pub struct FileSystem(RequestServer);

impl FileSystem {
    /// Serves a directory.
    ///
    /// # Errors
    /// It can't be opened, or `/proc` isn't there.
    pub fn new(root: &Path) -> io::Result<Self> {
        let fd_directory = File::open("/proc/self/fd")?;
        let root = root.to_str().ok_or(io::ErrorKind::InvalidInput)?;
        let space = Space::new(SPACE, Box::new(|| ()));
        let file_system = file_system_at(root, fd_directory, OPEN_FILES, Some(space))?;
        Ok(Self(RequestServer::new(file_system)))
    }

    /// Serves the next request of a queue; gives the number of bytes written, or nothing if there is
    /// none.
    pub fn serve(&self, memory: &SharedMemory, queue: &mut Queue) -> Option<u32> {
        let chain = queue.iter(memory).ok()?.next()?;
        let head = chain.head_index();
        let reader = Reader::new(memory, chain.clone());
        let written = match (reader, Writer::new(memory, chain)) {
            (Ok(reader), Ok(writer)) => self.0.serve(reader, writer),
            _ => 0,
        };
        queue.add_used(memory, head, written).ok()?;
        Some(written)
    }

    /// Forgets everything about the guest.
    pub fn reset(&self) {
        self.0.reset();
    }
}
