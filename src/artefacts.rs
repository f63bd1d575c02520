//! Where the guest's kernel and agent are found, and what they say of themselves.
//!
//! They are three files in one folder: `vmlinux`, `vmlinux.json` (its [`KernelDescription`]) and
//! `kiln-agent`. The folder is, in this order: the one that a flag or the configuration file names,
//! the one that the environment variable `KILN_LIB_DIR` names, `../lib/kiln` beside kiln's own
//! executable, `/usr/lib/kiln`. A folder that is named must hold them; of the others the first that
//! has a kernel or an agent is taken.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde::Deserialize;

const KERNEL: &str = "vmlinux";
const DESCRIPTION: &str = "vmlinux.json";
const AGENT: &str = "kiln-agent";
const INSTALLED: &str = "/usr/lib/kiln";

/// The folder with the guest's kernel and agent.
#[derive(Debug, Clone)]
pub struct Artefacts {
    dir: PathBuf,
}

/// What `vmlinux.json` says of the kernel beside it.
#[derive(Debug, Clone, Deserialize)]
pub struct KernelDescription {
    /// What `uname -r` prints in the guest.
    pub kernel_release: String,
    /// Version of the source package it was built from.
    pub source_version: String,
}

/// Why the guest's kernel or agent cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ArtefactError {
    /// No folder has them.
    #[error(
        "no guest kernel and agent in {}; run `make` in kiln's source tree, or name their folder \
         with --lib-dir, lib_dir in the configuration file or KILN_LIB_DIR", list(.searched)
    )]
    NotFound {
        /// The folders that were looked into.
        searched: Vec<PathBuf>,
    },
    /// One of the files can't be read.
    #[error("{what} {} (install kiln again, or run `make` in its source tree)", .path.display())]
    Unreadable {
        /// Which of them.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The description isn't one.
    #[error("kernel description {} (install kiln again)", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// The agent doesn't answer as kiln's does.
    #[error(
        "guest agent {} does not say its version: it is not kiln's: install kiln again",
        .path.display()
    )]
    NotAgent {
        /// The file.
        path: PathBuf,
    },
    /// A file that should be an ELF executable isn't.
    #[error(
        "{what} {} is not an x86-64 ELF executable: install kiln again, or run `make` in its source \
         tree",
        .path.display()
    )]
    NotElf {
        /// Which of them.
        what: &'static str,
        /// The file.
        path: PathBuf,
    },
}

fn list(dirs: &[PathBuf]) -> String {
    dirs.iter().map(|dir| dir.display().to_string()).collect::<Vec<_>>().join(", ")
}

impl Artefacts {
    /// Finds the folder; `named` is what a flag or the configuration file says.
    ///
    /// # Errors
    /// [`ArtefactError::NotFound`]
    pub fn find(named: Option<&Path>) -> Result<Self, ArtefactError> {
        let named = named
            .map(Path::to_owned)
            .or_else(|| std::env::var_os("KILN_LIB_DIR").map(PathBuf::from));
        let candidates = match named {
            Some(dir) => vec![dir],
            None => beside_executable().into_iter().chain([PathBuf::from(INSTALLED)]).collect(),
        };
        let found =
            candidates.iter().find(|dir| dir.join(KERNEL).exists() || dir.join(AGENT).exists());
        match found {
            Some(dir) => Ok(Self { dir: dir.clone() }),
            None => Err(ArtefactError::NotFound { searched: candidates }),
        }
    }

    /// Opens the guest's kernel.
    ///
    /// # Errors
    /// It isn't there, can't be read or is no ELF file.
    pub fn open_kernel(&self) -> Result<File, ArtefactError> {
        open_elf("guest kernel", self.dir.join(KERNEL))
    }

    /// Opens the agent.
    ///
    /// # Errors
    /// It isn't there, can't be read or is no ELF file.
    pub fn open_agent(&self) -> Result<File, ArtefactError> {
        open_elf("guest agent", self.dir.join(AGENT))
    }

    /// Reads what the kernel's description says.
    ///
    /// # Errors
    /// It can't be read or doesn't parse.
    pub fn kernel_description(&self) -> Result<KernelDescription, ArtefactError> {
        let path = self.dir.join(DESCRIPTION);
        let text = std::fs::read(&path).map_err(|source| ArtefactError::Unreadable {
            what: "kernel description",
            path: path.clone(),
            source,
        })?;
        serde_json::from_slice(&text).map_err(|source| ArtefactError::Malformed { path, source })
    }

    /// The agent's version, as it gives it when called with `--version`.
    ///
    /// # Errors
    /// It can't be run, or isn't kiln's agent.
    pub fn agent_version(&self) -> Result<String, ArtefactError> {
        let path = self.dir.join(AGENT);
        let output = Command::new(&path).arg("--version").stdin(Stdio::null()).output().map_err(
            |source| ArtefactError::Unreadable { what: "guest agent", path: path.clone(), source },
        )?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.trim().strip_prefix("kiln-agent ") {
            Some(version) if output.status.success() => Ok(version.to_owned()),
            _ => Err(ArtefactError::NotAgent { path }),
        }
    }
}

/// `../lib/kiln` beside the running executable.
fn beside_executable() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok()?;
    Some(executable.parent()?.parent()?.join("lib/kiln"))
}

/// Opens a file and checks the ELF identification and machine at its start.
fn open_elf(what: &'static str, path: PathBuf) -> Result<File, ArtefactError> {
    use std::os::unix::fs::FileExt;

    let unreadable = |source| ArtefactError::Unreadable { what, path: path.clone(), source };
    let file = File::open(&path).map_err(unreadable)?;
    let mut header = [0; 20];
    match file.read_exact_at(&mut header, 0) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(ArtefactError::NotElf { what, path });
        }
        Err(error) => return Err(unreadable(error)),
    }
    // ELF gABI chapter 4: magic, ELFCLASS64, ELFDATA2LSB; e_machine EM_X86_64.
    let is_elf = header.starts_with(b"\x7fELF\x02\x01") && header[18..20] == [62, 0];
    if !is_elf {
        return Err(ArtefactError::NotElf { what, path });
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_folder_without_artefacts_is_named_in_the_error() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let error = Artefacts::find(Some(dir.path())).expect_err("empty");
        assert!(error.to_string().contains(&dir.path().display().to_string()), "{error}");
    }

    #[test]
    fn kernel_that_is_no_elf_is_refused() {
        let dir = tempfile::tempdir().expect("temporary directory");
        for content in ["", "MZ, a compressed kernel image of some sort"] {
            std::fs::write(dir.path().join(KERNEL), content).expect("written");
            let artefacts = Artefacts::find(Some(dir.path())).expect("found");
            let error = artefacts.open_kernel().expect_err("no ELF");
            assert!(matches!(error, ArtefactError::NotElf { .. }), "{error}");
        }
    }
}
