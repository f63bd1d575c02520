//! The archive: a tar file with a folder of named parts, and a manifest that says of each whether it
//! is there, and why not.

use std::fmt::Write;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

/// The most bytes of one part; what a part has beyond is cut off.
pub const MAX_PART: usize = 1 << 20;

/// Parts that are to be an archive.
#[derive(Debug)]
pub struct Archive {
    folder: String,
    parts: Vec<(String, Result<Vec<u8>, String>)>,
}

impl Archive {
    /// An empty one, with this folder.
    pub fn new(folder: String) -> Self {
        Self { folder, parts: Vec::new() }
    }

    /// Adds a part, or the reason why it is missing. The name is kiln's own choice.
    pub fn add(&mut self, name: impl Into<String>, content: anyhow::Result<impl Into<Vec<u8>>>) {
        let content = content.map(Into::into).map_err(|error| format!("{error:#}"));
        self.parts.push((name.into(), content));
    }

    /// The archive's bytes.
    ///
    /// # Errors
    /// There is no memory.
    pub fn pack(self) -> io::Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, &self.folder, "MANIFEST", self.manifest().as_bytes())?;
        for (name, content) in &self.parts {
            if let Ok(content) = content {
                append(&mut tar, &self.folder, name, &content[..content.len().min(MAX_PART)])?;
            }
        }
        tar.into_inner()
    }

    fn manifest(&self) -> String {
        let mut manifest = String::new();
        for (name, content) in &self.parts {
            let state = match content {
                Ok(content) if content.len() > MAX_PART => {
                    format!("the first {MAX_PART} of {} bytes", content.len())
                }
                Ok(content) => format!("{} bytes", content.len()),
                Err(reason) => format!("missing: {}", reason.replace('\n', " ")),
            };
            // Writing to a string can't fail.
            let _ = writeln!(manifest, "{name}: {state}");
        }
        manifest
    }
}

fn append(
    tar: &mut tar::Builder<Vec<u8>>,
    folder: &str,
    name: &str,
    content: &[u8],
) -> io::Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o600);
    header.set_size(content.len() as u64);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    header.set_mtime(now.as_secs());
    tar.append_data(&mut header, format!("{folder}/{name}"), content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::anyhow;
    use std::io::Read;

    #[test]
    fn parts_are_there_or_missing_with_the_reason() {
        let folder = format!("kiln-debug-{}", "n".repeat(255));
        let mut archive = Archive::new(folder.clone());
        archive.add("a/b.txt", Ok("text"));
        archive.add("c", Err::<Vec<u8>, _>(anyhow!("no\nsuch thing")));
        archive.add("d", Ok(vec![b'x'; MAX_PART + 1]));
        let bytes = archive.pack().expect("packs");
        let mut reader = tar::Archive::new(bytes.as_slice());
        let mut found = Vec::new();
        for entry in reader.entries().expect("entries") {
            let mut entry = entry.expect("entry");
            let name = entry.path().expect("path").display().to_string();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).expect("content");
            found.push((name, content));
        }
        let manifest =
            "a/b.txt: 4 bytes\nc: missing: no such thing\nd: the first 1048576 of 1048577 bytes\n";
        assert_eq!(found[0], (format!("{folder}/MANIFEST"), manifest.into()));
        assert_eq!(found[1], (format!("{folder}/a/b.txt"), b"text".to_vec()));
        assert_eq!((found[2].0.as_str(), found[2].1.len()), (&*format!("{folder}/d"), MAX_PART));
        assert_eq!(found.len(), 3);
    }
}
