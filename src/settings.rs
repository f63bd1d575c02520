//! Settings of the configuration file.
//!
//! The file is TOML, by default `/etc/kiln/config.toml`, which need not exist; a file that
//! `--config` names must. A key that isn't one of [`Settings`]'s is an error that names it. Flags
//! and annotations override what stands here, and both override the defaults.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::limits::Given;

/// Where the configuration file is unless `--config` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/kiln/config.toml";

/// What executes a guest's code, as configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// kvm where it can run Linux, else emulated
    #[default]
    Auto,
    /// kiln's own machine monitor on /dev/kvm
    Kvm,
    /// QEMU's software CPU: for development and tests, not a security boundary
    Emulated,
}

impl std::str::FromStr for EngineChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "kvm" => Ok(Self::Kvm),
            "emulated" => Ok(Self::Emulated),
            _ => Err(format!("unknown engine {text:?}: use auto, kvm or emulated")),
        }
    }
}

/// The configuration file's content; what it doesn't say is at its default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// What executes the guest's code.
    pub engine: EngineChoice,
    /// The guest's CPUs, 1 to 32; without it the bundle's limits decide, and then a default.
    pub cpus: Option<u8>,
    /// The guest's memory in MiB; likewise.
    pub memory_mib: Option<u64>,
    /// Limits of every sandbox that says nothing else.
    pub limits: Given,
    /// The folder of the guest kernel and the agent.
    pub lib_dir: Option<PathBuf>,
    /// QEMU's executable, for the emulated engine.
    pub qemu: PathBuf,
    /// Seconds until the guest's agent must have called, from the start of the machine on.
    pub agent_deadline: u64,
    /// Seconds that the agent may take to set a container up and to start it, each.
    pub create_deadline: u64,
    /// Seconds that a guest may take to end once it has been told to, and a step whose time is over.
    pub shutdown_deadline: u64,
    /// Words appended to the guest kernel's command line.
    pub kernel_args: String,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            engine: EngineChoice::Auto,
            cpus: None,
            memory_mib: None,
            limits: Given::default(),
            lib_dir: None,
            qemu: PathBuf::from("qemu-system-x86_64"),
            agent_deadline: 60,
            create_deadline: 60,
            shutdown_deadline: 10,
            kernel_args: String::new(),
        }
    }
}

/// Why the configuration file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// It can't be read.
    #[error("configuration file {}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is no TOML, or has a key or value that isn't allowed.
    #[error("configuration file {}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// Line, column, key and what is wrong.
        #[source]
        source: Box<toml::de::Error>,
    },
}

impl Settings {
    /// Reads the file that `named` names, or the default one if there is one.
    ///
    /// # Errors
    /// See [`SettingsError`].
    pub fn load(named: Option<&Path>) -> Result<Self, SettingsError> {
        let path = named.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if named.is_none() && error.kind() == io::ErrorKind::NotFound => {
                return Ok(Self::default());
            }
            Err(source) => return Err(SettingsError::Unreadable { path: path.into(), source }),
        };
        toml::from_str(&text).map_err(|source| SettingsError::Malformed {
            path: path.into(),
            source: Box::new(source),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).expect("written");
        Settings::load(Some(&path))
    }

    #[test]
    fn empty_file_is_the_defaults() {
        assert_eq!(parse("").expect("valid"), Settings::default());
    }

    #[test]
    fn unknown_keys_are_named_with_their_line() {
        let error = anyhow::Error::new(parse("cpus = 2\nmemmory_mib = 3\n").expect_err("unknown"));
        let text = format!("{error:#}");
        assert!(text.contains("memmory_mib") && text.contains("line 2"), "{text}");
    }

    #[test]
    fn limits_are_read_and_wrong_ones_are_shown_with_their_line_and_mend() {
        let settings = parse("[limits]\ndeadline = \"1h\"\noutput_limit = 4096\n").expect("valid");
        let given = settings.limits;
        assert_eq!(given.deadline, Some("60m".parse().expect("time")));
        assert_eq!(given.output_limit, Some("4K".parse().expect("bytes")));
        for wrong in ["deadline = \"soon\"", "deadline = 0"] {
            let error = parse(&format!("[limits]\n{wrong}\n")).expect_err("wrong");
            let text = format!("{:#}", anyhow::Error::new(error));
            assert!(text.contains(wrong) && text.contains("as in 90s"), "{text}");
        }
    }

    #[test]
    fn named_file_must_exist() {
        let error = Settings::load(Some(Path::new("/nonexistent/kiln.toml"))).expect_err("absent");
        assert!(matches!(error, SettingsError::Unreadable { .. }));
    }
}
