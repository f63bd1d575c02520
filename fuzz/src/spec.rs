//! config.json, as the host checks it and as the guest carries it out.

use std::fs;
use std::sync::LazyLock;

use kiln_protocol::{CreateContainer, Stdio};
use serde_json::json;
use serde_json::value::{RawValue, to_raw_value};

use crate::bundle::{Bundle, Host, Limits, Program, Size, memory_limit};

/// A bundle's folder, with a root file system and what a bind mount may name.
static FOLDER: LazyLock<tempfile::TempDir> = LazyLock::new(|| {
    let folder = tempfile::tempdir().expect("a folder");
    for directory in ["rootfs", "rootfs/etc", "source"] {
        fs::create_dir(folder.path().join(directory)).expect("made");
    }
    fs::write(folder.path().join("source/file"), "").expect("written");
    std::os::unix::fs::symlink("/etc", folder.path().join("rootfs/link")).expect("linked");
    folder
});

/// The input is config.json, as the host reads it.
pub fn bundle(bytes: &[u8]) {
    let folder = FOLDER.path();
    fs::write(folder.join("config.json"), bytes).expect("written");
    let Ok(bundle) = Bundle::load(folder) else { return };
    let host = Host { cpus: 4, memory_mib: 8192 };
    let size = Size::decide(Limits::default(), &bundle.spec, host).expect("derived sizes fit");
    assert!((1..=4).contains(&size.cpus) && (128..=8192).contains(&size.memory_mib));
    let _ = (memory_limit(&bundle.spec), bundle.annotation("io.kiln.cpus"), bundle.terminal());
}

/// The input is a process object of `kiln exec`, as the host reads it.
pub fn process(bytes: &[u8]) {
    let path = FOLDER.path().join("process.json");
    fs::write(&path, bytes).expect("written");
    let container = json!({"capabilities": {"bounding": ["CAP_KILL"]}, "rlimits": []});
    let _ = Program::load(&path, &container);
}

/// The input is config.json, as the guest reads it.
pub fn guest(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else { return };
    let Ok(config) = RawValue::from_string(text.to_owned()) else { return };
    let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
    let container = "container".to_owned();
    let state = to_raw_value(&json!({"pid": 1})).expect("an object");
    let create = CreateContainer {
        container,
        config,
        state,
        rootfs: String::new(),
        binds: Vec::new(),
        joined: None,
        stdio,
    };
    let _ = kiln_agent::container::Plan::new(&create, 2);
}
