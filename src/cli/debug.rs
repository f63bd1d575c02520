//! `kiln debug`: what is known of a container, in one archive without secrets.
//!
//! The archive is a tar file. Its `MANIFEST` names each part, and of those that are missing the
//! reason.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};

use super::{Global, doctor, version};
use crate::diagnosis::{self, Archive};
use crate::doctor::examine;
use crate::engine::Memory;
use crate::settings::Settings;
use crate::state::{self, StateError};

/// Options of `kiln debug`.
#[derive(Debug, clap::Args)]
pub struct Debug {
    /// Write the archive to this file, which must not exist, or with `-` to standard output
    /// [default: kiln-debug-ID.tar]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The container's id
    id: String,
}

/// Collects and writes the archive. A part that is missing is no error.
pub fn run(global: &Global, debug: &Debug) -> anyhow::Result<ExitCode> {
    let found = state::find(&global.root, &debug.id);
    if let Err(error @ StateError::Unknown { .. }) = found {
        return Err(error.into());
    }
    let path = match &debug.output {
        Some(path) => path.clone(),
        None => format!("kiln-debug-{}.tar", debug.id).into(),
    };
    let mut output = Output::open(&path)?;
    let mut archive = Archive::new(format!("kiln-debug-{}", debug.id));
    add_installation(&mut archive, global);
    let state = global.root.join(&debug.id);
    diagnosis::collect(&mut archive, &found, &state, global.log.as_deref());
    let bytes = archive.pack().context("archive")?;
    output.write(&bytes).with_context(|| path.display().to_string())?;
    Ok(ExitCode::SUCCESS)
}

/// What of kiln is there, and what it can do here.
fn add_installation(archive: &mut Archive, global: &Global) {
    let settings = Settings::load(global.config.as_deref()).map_err(anyhow::Error::new);
    let settings = match settings {
        Ok(settings) => settings,
        Err(error) => {
            archive.add("settings", Err::<Vec<u8>, _>(error));
            Settings::default()
        }
    };
    let lib_dir = global.lib_dir.as_deref().or(settings.lib_dir.as_deref());
    let mut versions = Vec::new();
    let written = version::write(&mut versions, lib_dir);
    archive.add("versions.txt", written.map(|()| versions).map_err(Into::into));
    let report = examine(&settings, lib_dir, Memory::Trusted);
    let mut checks = Vec::new();
    let written = doctor::print(&mut checks, &report);
    archive.add("doctor.txt", written.map(|()| checks).map_err(Into::into));
}

/// Where the archive goes. A file that isn't written to its end is removed.
enum Output<'a> {
    Standard,
    File { file: File, path: &'a Path, is_whole: bool },
}

impl<'a> Output<'a> {
    fn open(path: &'a Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            if io::stdout().is_terminal() {
                bail!("--output -: standard output is a terminal: redirect it to a file");
            }
            return Ok(Self::Standard);
        }
        // It is for its reader alone; what is there already is somebody's.
        match File::options().write(true).create_new(true).mode(0o600).open(path) {
            Ok(file) => Ok(Self::File { file, path, is_whole: false }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                bail!("{} exists: remove it, or name another file with --output", path.display())
            }
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Standard => io::stdout().lock().write_all(bytes),
            Self::File { file, path, is_whole } => {
                file.write_all(bytes)?;
                *is_whole = true;
                writeln!(io::stdout().lock(), "{}", path.display())
            }
        }
    }
}

impl Drop for Output<'_> {
    fn drop(&mut self) {
        if let Self::File { path, is_whole: false, .. } = self {
            // It may be gone by itself.
            let _ = fs::remove_file(path);
        }
    }
}
