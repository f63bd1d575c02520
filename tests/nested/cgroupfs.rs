//! Version 2 with controllers, and kiln managing the cgroup by itself.

use std::fs;
use std::path::Path;

use serde_json::json;

use crate::host::{CGROUPS, eventually, read, within};
use crate::stage::{Stage, create, errors, processes_of, succeeds};

const CGROUP: &str = "/kiln-test/c1";

#[test]
fn the_cgroup_has_processes_and_limits_and_goes_with_the_container() {
    within("cgroupfs::the_cgroup_has_processes_and_limits_and_goes_with_the_container", || {
        let stage = Stage::new(&["sleep", "100000"]);
        stage.edit(|config| {
            config["linux"]["cgroupsPath"] = json!(CGROUP);
            config["linux"]["namespaces"]
                .as_array_mut()
                .expect("an array")
                .push(json!({"type": "cgroup"}));
            config["linux"]["resources"] = json!({
                "memory": {"limit": 64 << 20, "reservation": 32 << 20},
                "pids": {"limit": 50},
                "cpu": {"shares": 512, "quota": 150_000, "period": 50_000, "cpus": "0"},
            });
        });
        let output = create(&stage, &["--memory", "128"]);
        assert!(output.status.success(), "{}", errors(&output));

        let mut found: Vec<i32> =
            read(CGROUP, "cgroup.procs").lines().map(|pid| pid.parse().expect("a pid")).collect();
        let mut expected = processes_of(&stage);
        expected.retain(|pid| *pid != 1);
        found.sort_unstable();
        expected.sort_unstable();
        assert!(found.len() >= 4, "monitor, file system, devices, QEMU: {found:?}");
        assert_eq!(found, expected);
        assert!(found.contains(&stage.state()["pid"].as_i64().map(|pid| pid as i32).expect("pid")));

        // The guest has 128 MiB; beside it are 256 MiB, and 1024 MiB of the emulated engine.
        let total = (128 + 256 + 1024) << 20;
        let limits = |expected: &[(&str, &str)]| {
            for (file, value) in expected {
                assert_eq!(read(CGROUP, file), *value, "{file}");
            }
        };
        limits(&[
            ("memory.max", &total.to_string()),
            ("memory.low", &(total - (32 << 20)).to_string()),
            ("pids.max", &(50 + 512).to_string()),
            ("cpu.max", "150000 50000"),
            ("cpu.weight", "20"),
            ("cpuset.cpus", "0"),
        ]);
        assert!(read(CGROUP, "memory.current").parse::<u64>().expect("a number") > 64 << 20);
        assert!(read(CGROUP, "cpu.stat").contains("usage_usec"));

        succeeds(&stage, &["start", "test"]);
        eventually("the start", || stage.state()["status"] == "running");
        for (options, expected) in [
            (["--pids-limit", "60"], ("pids.max", "572")),
            (["--pids-limit", "-1"], ("pids.max", "max")),
            (["--cpu-quota", "40000"], ("cpu.max", "40000 50000")),
            (["--cpu-period", "80000"], ("cpu.max", "40000 80000")),
            (["--cpu-quota", "-1"], ("cpu.max", "max 80000")),
            (["--cpu-share", "2"], ("cpu.weight", "1")),
        ] {
            succeeds(&stage, &["update", options[0], options[1], "test"]);
            limits(&[expected]);
        }

        succeeds(&stage, &["delete", "--force", "test"]);
        assert!(!Path::new(CGROUPS).join("kiln-test").exists());
        assert!(stage.is_clean() && fs::exists(format!("{CGROUPS}/caller")).expect("cgroups"));
    });
}
