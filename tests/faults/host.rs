//! What a test's sandboxes have on the host: everything that could be left behind.
//!
//! Others use the host at the same time, so each thing is known by a mark of the test's own: a process
//! by its environment, which jails keep; files, mounts and sockets by the stage's folder; cgroups by
//! its name. What has no name of its own (memory, namespaces, taps) lives in a process, or in a
//! namespace that a process or a mount holds, and goes with the last of these.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::stage::{Stage, processes_of};

/// How long the kernel may take to give everything back on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A stage whose containers have a cgroup by which they are known, and a network of their own.
pub fn marked(args: &[&str]) -> Stage {
    let stage = Stage::new(args);
    let path = format!("/{}", mark(&stage));
    stage.edit(|config| {
        let linux = &mut config["linux"];
        linux["cgroupsPath"] = json!(path);
        linux["namespaces"].as_array_mut().expect("a list").push(json!({"type": "network"}));
    });
    stage
}

/// What the names of a stage's cgroups begin with.
pub fn mark(stage: &Stage) -> String {
    let name = stage.path().file_name().expect("a name").to_string_lossy();
    format!("kiln-faults-{}", name.trim_start_matches('.'))
}

/// What there is of a stage's sandboxes.
#[derive(Debug, PartialEq, Eq)]
pub struct Host(BTreeSet<String>);

impl Host {
    /// Looks at everything.
    pub fn look(stage: &Stage) -> Self {
        let folder = stage.path().to_string_lossy().into_owned();
        let mut found = BTreeSet::new();
        for pid in processes_of(stage) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            found.insert(format!("process {pid} {}", name.trim()));
        }
        for (kind, table) in
            [("mount", "/proc/thread-self/mountinfo"), ("socket", "/proc/net/unix")]
        {
            let text = fs::read_to_string(table).expect("proc");
            let own = text.lines().filter(|line| line.contains(&folder));
            found.extend(own.map(|line| format!("{kind} {line}")));
        }
        files(&stage.root(), &mut found);
        cgroups(Path::new("/sys/fs/cgroup"), &mark(stage), &mut found);
        Self(found)
    }

    /// Waits until there is no more than at this time; fails with what is left.
    pub fn is_as_before(&self, stage: &Stage) {
        let begin = Instant::now();
        loop {
            let Self(now) = Self::look(stage);
            let left: Vec<_> = now.difference(&self.0).collect();
            if left.is_empty() {
                return;
            }
            assert!(begin.elapsed() < PATIENCE, "left behind: {left:#?}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn files(directory: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        found.insert(format!("file {}", entry.path().display()));
        files(&entry.path(), found);
    }
}

fn cgroups(directory: &Path, mark: &str, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            if entry.file_name().to_string_lossy().contains(mark) {
                found.insert(format!("cgroup {}", entry.path().display()));
            }
            cgroups(&entry.path(), mark, found);
        }
    }
}

/// A process's role in a sandbox, by its name.
pub fn role(pid: i32) -> &'static str {
    let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    match name.trim() {
        "kiln" => "command",
        "kiln-monitor" => "monitor",
        "kiln-exec" => "exec proxy",
        "kiln-fs" => "file system",
        "kiln-devices" => "devices",
        "kiln-vmm" => "vmm",
        name if name.starts_with("qemu-system") => "QEMU",
        // Executed through a link in /proc, and not renamed yet.
        _ => "starting",
    }
}
