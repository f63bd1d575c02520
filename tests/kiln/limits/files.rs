//! Steps that take more of the host's file systems than they may, or faster.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::cgroup::{limit, set_path, unique};
use crate::lifecycle::{create, succeeds};
use crate::stage::{Stage, errors};

fn run(stage: &Stage, options: &[&str]) -> Output {
    let output = stage.run(options).stdin(Stdio::null()).output().expect("kiln");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
    output
}

/// How much the files of a directory take of the host's file system, in bytes.
fn taken(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).expect("directory").map(|entry| entry.expect("entry"));
    let sizes = entries.map(|entry| {
        let metadata = entry.metadata().expect("metadata");
        let below = if metadata.is_dir() { taken(&entry.path()) } else { 0 };
        metadata.blocks() * 512 + below
    });
    sizes.sum()
}

#[test]
fn what_a_step_adds_is_limited_wherever_it_adds_it() {
    let script = "
        mkdir /made; i=0
        while dd if=/dev/zero of=/made/$i bs=1M count=1 && dd if=/dev/zero of=/mnt/$i bs=1M count=1
        do i=$((i + 1)); [ $i -lt 50 ] || exit 9; done
        exit 7";
    let stage = Stage::new(&["sh", "-c", script]);
    let volume = stage.path().join("volume");
    fs::create_dir(&volume).expect("made");
    stage.edit(|config| {
        let mount = json!({"destination": "/mnt", "type": "bind", "source": volume,
                           "options": ["bind"]});
        config["mounts"].as_array_mut().expect("mounts").push(mount);
    });
    let before = taken(&stage.rootfs());
    let output = run(&stage, &["--disk-limit", "8M"]);
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(7), "{errors}");
    assert!(errors.contains("Disk quota exceeded"), "{errors}");
    let words = "kiln: the step's disk limit of 8 MiB was reached";
    assert!(errors.contains(words) && errors.contains("raise --disk-limit"), "{errors}");
    let added = taken(&stage.rootfs()) - before + taken(&volume);
    assert!(added <= 8 << 20 && added > 6 << 20, "{added} bytes");
}

#[test]
fn what_a_step_removes_again_it_may_add_again() {
    // The guest's kernel forgets a removed file when it gets to it.
    let script = "
        i=0
        while [ $i -lt 8 ]; do
            until dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; do sleep 0.1; done
            rm /file; i=$((i + 1))
        done
        echo all";
    let output = run(&Stage::new(&["sh", "-c", script]), &["--disk-limit", "4M"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "all\n", "{}", errors(&output));
    assert_eq!(output.status.code(), Some(0));
}

#[test]
fn what_another_mount_of_a_directory_keeps_open_is_not_free() {
    // The guest's kernel forgets a file of the other mount when it finds another under its name.
    let script = "
        fill() { dd if=/dev/zero of=/mnt/file bs=1M count=8 2>/dev/null; }
        i=0
        while [ $i -lt 4 ] && fill; do
            eval \"exec $((i + 3))</again/file\"; rm /mnt/file; i=$((i + 1)); sleep 0.3
        done
        echo $i kept
        rm /mnt/file
        exec 3<&- 4<&- 5<&- 6<&-
        until fill; do sleep 0.1; : </again/file; done
        echo free";
    let stage = Stage::new(&["sh", "-c", script]);
    let volume = stage.path().join("volume");
    fs::create_dir(&volume).expect("made");
    stage.edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        for destination in ["/mnt", "/again"] {
            mounts.push(json!({"destination": destination, "type": "bind", "source": volume,
                               "options": ["bind"]}));
        }
    });
    let output = run(&stage, &["--disk-limit", "16M"]);
    let written = String::from_utf8_lossy(&output.stdout);
    assert_eq!(written, "1 kept\nfree\n", "{}", errors(&output));
}

#[test]
fn bytes_and_requests_wait_for_their_turn() {
    // Each can only take longer on a busy machine.
    let script = "dd if=/dev/zero of=/file bs=64k count=96 2>/dev/null; echo done";
    for option in [["--disk-bandwidth", "2M"], ["--iops", "40"]] {
        let stage = Stage::new(&["sh", "-c", script]);
        let begin = Instant::now();
        let output = run(&stage, &option);
        assert_eq!(output.stdout, b"done\n", "{}", errors(&output));
        assert!(begin.elapsed() > Duration::from_millis(2300), "{option:?}: {:?}", begin.elapsed());
    }
}

#[test]
fn throttles_of_the_hosts_devices_are_its_cgroups() {
    let partitions = fs::read_to_string("/proc/partitions").expect("partitions");
    let mut fields = partitions.lines().nth(2).expect("a block device").split_whitespace();
    let mut number =
        || fields.next().and_then(|field| field.parse::<u32>().ok()).expect("a number");
    let (major, minor) = (number(), number());
    let stage = Stage::new(&["sleep", "1000"]);
    let path = unique("throttled");
    set_path(&stage, &path);
    stage.edit(|config| {
        let throttle = json!([{"major": major, "minor": minor, "rate": 7_654_321}]);
        config["linux"]["resources"]["blockIO"] = json!({"throttleReadBpsDevice": throttle});
    });
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let found = limit("blkio", &path, "blkio.throttle.read_bps_device", "io.max");
    assert!(
        found.starts_with(&format!("{major}:{minor} ")) && found.contains("7654321"),
        "{found}"
    );
    succeeds(&stage, &["delete", "--force", "test"]);
}
