//! JSON documents that may be longer than a packet: they travel as a file in memory, whose
//! descriptor comes with the message that is about them.
//!
//! The reader trusts the writer with descriptors, but not to keep to the form: what is no regular
//! file (reading a pipe could take for ever) or too long is refused.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use serde::Serialize;
use serde_json::value::RawValue;

use crate::process::memory_file;

/// Longest document in bytes: a process with as many arguments as the kernel takes, twice.
pub const MAX_DOCUMENT: u64 = 4 << 20;

/// Writes a document.
///
/// # Errors
/// No memory for it.
pub fn write(document: &impl Serialize) -> io::Result<OwnedFd> {
    let mut file = memory_file("kiln-document")?;
    file.write_all(&serde_json::to_vec(document)?)?;
    Ok(file.into())
}

/// Reads the one document that came with a message.
///
/// # Errors
/// There is not exactly one, or it is not what a document may be.
pub fn read(descriptors: Vec<OwnedFd>) -> io::Result<Box<RawValue>> {
    let invalid = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
    let [document] = <[OwnedFd; 1]>::try_from(descriptors)
        .map_err(|_| invalid("not one document came with the message".to_owned()))?;
    let file = File::from(document);
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(invalid("the document is no file".to_owned()));
    }
    let length = metadata.len();
    if length > MAX_DOCUMENT {
        return Err(invalid(format!("{length} bytes exceed the limit of {MAX_DOCUMENT}")));
    }
    let mut text = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
    file.read_exact_at(&mut text, 0)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn document_arrives_as_it_was() {
        let long = "x".repeat(1 << 20);
        let document = write(&long).expect("written");
        let read: String =
            serde_json::from_str(read(vec![document]).expect("read").get()).expect("a string");
        assert!(read == long);
    }

    #[test]
    fn what_is_no_document_is_refused() {
        let (reader, _writer) = io::pipe().expect("pipe");
        assert!(read(vec![reader.into()]).is_err());
        assert!(read(Vec::new()).is_err());
        let too_long = memory_file("x").expect("file");
        too_long.set_len(MAX_DOCUMENT + 1).expect("length");
        assert!(read(vec![too_long.into()]).is_err());
    }
}
