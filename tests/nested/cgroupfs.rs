//! Version 2 with controllers, and kiln managing the cgroup by itself.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::host::{
    CGROUPS, await_end, await_processes, begin, call_off, eventually, is_whole, read, within,
};
use crate::stage::{Stage, errors, kiln, succeeds};

const CGROUP: &str = "/kiln-test/c1";

fn holds(limits: &[(&str, &str)]) {
    for (file, value) in limits {
        assert_eq!(read(CGROUP, file), *value, "{file}");
    }
}

#[test]
fn the_cgroup_has_processes_and_limits_and_goes_with_the_container() {
    within("cgroupfs::the_cgroup_has_processes_and_limits_and_goes_with_the_container", || {
        let stage = Stage::new(&["sleep", "100000"]);
        stage.edit(|config| {
            config["linux"]["cgroupsPath"] = json!(CGROUP);
            let namespaces = config["linux"]["namespaces"].as_array_mut();
            namespaces.expect("an array").push(json!({"type": "cgroup"}));
            config["linux"]["resources"] = json!({
                "memory": {"limit": 64 << 20, "reservation": 32 << 20},
                "pids": {"limit": 50},
                "cpu": {"shares": 512, "quota": 150_000, "period": 50_000, "cpus": "0"},
            });
        });
        let command = begin(&stage, &[]);
        let processes = await_processes(&stage, &command, CGROUP);
        // The guest has 128 MiB, its files as much again; the emulated engine 256 + 1024 MiB.
        let total = (2 * 128 + 256 + 1024) << 20;
        holds(&[
            ("memory.max", &total.to_string()),
            ("memory.low", &(total - (32 << 20)).to_string()),
            ("pids.max", &(50 + 512).to_string()),
            ("cpu.weight", "20"),
            ("cpuset.cpus", "0"),
            // The boot isn't the container's.
            ("cpu.max", "max 100000"),
        ]);
        assert!(read(CGROUP, "memory.current").parse::<u64>().expect("a number") > 1 << 20);
        assert!(read(CGROUP, "cpu.stat").contains("usage_usec"));
        if is_whole() {
            await_end(&stage, command);
            change(&stage);
            fill(&stage, processes);
            succeeds(&stage, &["delete", "--force", "test"]);
        } else {
            call_off(command);
        }
        assert!(!Path::new(CGROUPS).join("kiln-test").exists());
        assert!(stage.is_clean() && fs::exists(format!("{CGROUPS}/caller")).expect("cgroups"));
    });
}

/// The quota holds from now on, and limits change one by one.
fn change(stage: &Stage) {
    holds(&[("cpu.max", "150000 50000")]);
    succeeds(stage, &["start", "test"]);
    for (options, expected) in [
        (["--pids-limit", "60"], ("pids.max", "572")),
        (["--pids-limit", "-1"], ("pids.max", "max")),
        (["--cpu-quota", "40000"], ("cpu.max", "40000 50000")),
        (["--cpu-period", "80000"], ("cpu.max", "40000 80000")),
        (["--cpu-quota", "-1"], ("cpu.max", "max 80000")),
        (["--cpu-share", "2"], ("cpu.weight", "1")),
    ] {
        succeeds(stage, &["update", options[0], options[1], "test"]);
        holds(&[expected]);
    }
}

/// Memory that runs out in the container is counted where its caller looks, and harms nothing else there.
fn fill(stage: &Stage, processes: usize) {
    assert!(read(CGROUP, "memory.events").contains("oom_kill 0"));
    let hog = ["exec", "test", "dd", "if=/dev/zero", "of=/dev/null", "bs=80M", "count=1"];
    let output = kiln(stage, &hog);
    assert_eq!(output.status.code(), Some(137), "{}", errors(&output));
    eventually("the count", || read(CGROUP, "memory.events").contains("oom_kill 1"));
    assert_eq!(stage.state()["annotations"]["io.kiln.oom-killed"], "1");
    assert_eq!(stage.state()["status"], "running");
    eventually("its end", || read(CGROUP, "cgroup.procs").lines().count() == processes);
}
