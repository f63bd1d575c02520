//! The guest's initial RAM disk: the agent as `/init` and a console, made at each start.
//!
//! It is a cpio archive (`newc`; the kernel's `Documentation/driver-api/early-userspace`) in a memory
//! file. It isn't kept between starts: it is one copy of the agent, which takes less time than the
//! checks that a cached one would need.

use std::fs::File;
use std::io::{self, Read, Seek, Write};

use cpio::newc::{Builder, trailer};

use crate::process::memory_file;

const DIRECTORY: u32 = 0o040_755;
const EXECUTABLE: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;

/// Makes the archive around an agent; it is at its start when returned.
///
/// # Errors
/// The agent can't be read, or there is no memory.
pub fn build(agent: &mut File) -> io::Result<File> {
    let mut content = Vec::new();
    agent.read_to_end(&mut content)?;
    let size = u32::try_from(content.len())
        .map_err(|_| io::Error::new(io::ErrorKind::FileTooLarge, "agent of 4 GiB or more"))?;
    let mut archive = memory_file("kiln-initrd")?;
    for directory in ["dev", "proc", "sys", "run"] {
        write_entry(&mut archive, Builder::new(directory).mode(DIRECTORY).nlink(2).ino(0))?;
    }
    // The kernel opens it as init's standard input, output and error.
    let console = Builder::new("dev/console").mode(CHARACTER_DEVICE).rdev_major(5).rdev_minor(1);
    write_entry(&mut archive, console)?;
    let mut entry = Builder::new("init").mode(EXECUTABLE).write(&mut archive, size);
    entry.write_all(&content)?;
    entry.finish()?;
    trailer(&mut archive)?;
    archive.rewind()?;
    Ok(archive)
}

fn write_entry(archive: &mut File, entry: Builder) -> io::Result<()> {
    entry.write(archive, 0).finish().map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn archive_holds_init_and_console() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("agent");
        std::fs::write(&path, b"\x7fELF and so on").expect("written");
        let mut archive = build(&mut File::open(&path).expect("opens")).expect("builds");
        let mut found = Vec::new();
        loop {
            let mut reader = cpio::newc::Reader::new(archive).expect("an entry");
            if reader.entry().is_trailer() {
                break;
            }
            let mut content = Vec::new();
            reader.read_to_end(&mut content).expect("reads");
            let entry = reader.entry();
            let device = (entry.rdev_major(), entry.rdev_minor());
            found.push((entry.name().to_owned(), entry.mode(), device, content.len()));
            archive = reader.finish().expect("finishes");
        }
        assert!(found.contains(&("dev/console".to_owned(), CHARACTER_DEVICE, (5, 1), 0)));
        assert_eq!(found.last(), Some(&("init".to_owned(), EXECUTABLE, (0, 0), 14)));
    }
}
