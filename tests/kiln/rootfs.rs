//! Tools on the host that enter the namespaces of the process that stands for a container find its
//! files there.

use std::fs;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::lifecycle::{create, succeeds, wait_for};
use crate::stage::{Stage, errors};

#[test]
fn monitor_stands_in_the_assembled_root_file_system() {
    let stage = Stage::new(&["sh", "-c", "cat /tmp/copied; exit 6"]);
    let (volume, file) = (stage.path().join("volume"), stage.path().join("hosts"));
    fs::create_dir(&volume).expect("made");
    fs::write(volume.join("inside"), "x").expect("written");
    fs::write(&file, "1.2.3.4 here").expect("written");
    fs::write(stage.rootfs().join("etc/of-rootfs"), "").expect("written");
    stage.edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        mounts.push(
            json!({"destination": "/data", "type": "bind", "source": volume, "options": ["ro"]}),
        );
        mounts.push(json!({"destination": "/etc/hosts", "type": "bind", "source": file}));
        mounts.push(json!({"destination": "/dev/none", "type": "bind", "source": volume}));
        config["root"]["readonly"] = json!(false);
    });
    let pid_file = stage.path().join("pid");
    let output = create(&stage, &["--pid-file", &pid_file.display().to_string()]);
    assert!(output.status.success(), "{}", errors(&output));
    let pid = fs::read_to_string(&pid_file).expect("pid");

    let enter = |script: &str| {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--mount", "-t", &pid, "/bin/busybox", "sh", "-c", script]);
        nsenter.output().expect("nsenter")
    };
    let said = |script: &str| {
        let output = enter(script);
        assert!(output.status.success(), "{script}: {}", errors(&output));
        String::from_utf8(output.stdout).expect("text")
    };
    assert_eq!(said("cat /data/inside /etc/hosts"), "x1.2.3.4 here");
    assert_eq!(said("ls /etc"), "hosts\nof-rootfs\n");
    assert!(!enter("echo > /data/new").status.success());
    assert!(!enter("ls /..").stdout.windows(3).any(|name| name == b"usr"));
    said("echo brought > /tmp/copied");
    let root = format!("/proc/{pid}/root");
    assert_eq!(fs::read_to_string(root.clone() + "/data/inside").expect("reads"), "x");
    assert!(!fs::exists(root + "/usr").expect("looks"));

    succeeds(&stage, &["start", "test"]);
    wait_for(&stage, "stopped");
    assert_eq!(fs::read_to_string(stage.path().join("output")).expect("output"), "brought\n");
    succeeds(&stage, &["delete", "test"]);
    assert!(stage.is_clean());
}

#[test]
fn a_removed_directory_is_still_there_for_whoever_is_in_it() {
    let script = "mkdir /tmp/d; cd /tmp/d; rmdir /tmp/d; ls -a . && ls -ld . && ! mkdir x && cd /";
    let stage = Stage::new(&["sh", "-c", script]);
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
    assert!(!errors(&output).contains("Stale"), "{}", errors(&output));
}
