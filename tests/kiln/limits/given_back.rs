//! Memory that a sandbox has taken goes back to the host: while it idles, and at its end.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::run::wait_for_line;
use crate::stage::{Stage, errors, eventually, processes_of};

const MIB: u64 = 1 << 20;

/// The descriptors of a stage's processes that refer to guest memory, as paths.
fn guest_memory(stage: &Stage) -> Vec<std::path::PathBuf> {
    let descriptors = processes_of(stage).into_iter().flat_map(|pid| {
        let directory = fs::read_dir(format!("/proc/{pid}/fd"));
        directory.into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()))
    });
    let is_memory = |path: &std::path::PathBuf| {
        fs::read_link(path).is_ok_and(|link| link.to_string_lossy().contains("memory"))
    };
    descriptors.filter(is_memory).collect()
}

/// How much of the host's memory the guest's takes.
fn taken(stage: &Stage) -> u64 {
    let files = guest_memory(stage);
    let sizes = files.iter().filter_map(|file| Some(fs::metadata(file).ok()?.blocks() * 512));
    sizes.max().expect("a guest's memory")
}

#[test]
fn memory_that_a_step_has_freed_goes_back_while_it_runs() {
    // Files of a tmpfs are memory of the guest.
    let script = "
        trap 'rm /dev/large; echo freed' USR1
        dd if=/dev/zero of=/dev/large bs=1M count=160 2>/dev/null; echo filled
        while :; do sleep 1; done";
    let stage = Stage::new(&["sh", "-c", script]);
    let mut command = stage.run(&["--memory", "384"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("kiln");
    wait_for_line(&mut child, "filled");
    let full = taken(&stage);
    assert!(full > 160 * MIB, "{full} bytes");
    let command = Pid::from_raw(i32::try_from(child.id()).expect("a pid"));
    kill(command, Signal::SIGUSR1).expect("signalled");
    wait_for_line(&mut child, "freed");
    eventually("the host's memory back", || taken(&stage) + 128 * MIB < full);
    kill(command, Signal::SIGKILL).expect("killed");
    child.wait().expect("ends");
    eventually("the end of every process", || processes_of(&stage).is_empty());
}

#[test]
fn after_sandboxes_have_ended_nobody_holds_their_memory() {
    let stage = Stage::new(&["true"]);
    for _ in 0..5 {
        let output = stage.run(&["--memory", "192"]).stdin(Stdio::null()).output().expect("kiln");
        assert!(output.status.success(), "{}", errors(&output));
        eventually("the end of every process", || processes_of(&stage).is_empty());
        assert!(guest_memory(&stage).is_empty() && stage.is_clean());
    }
}
