//! A step with the capabilities that container engines give by default: the agent, the kernel's log, raw
//! devices and the guest's kernel are out of its reach, and the agent goes on to its end.

use std::path::Path;
use std::process::{Command, Stdio};

use kiln_protocol::{CONTROL_PORT, STREAM_PORT};
use serde_json::json;

use crate::stage::{Stage, errors};

/// What Docker, podman and containerd give.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
];

/// How many lines the program prints.
const ATTEMPTS: usize = 34;

#[test]
fn what_is_not_a_steps_own_is_out_of_its_reach() {
    let stage = Stage::new(&["/bin/step"]);
    let compiled = Command::new("gcc")
        .args(["-static", "-O2", "-Wall", "-Werror", "-s"])
        .arg(format!("-DCONTROL_PORT={CONTROL_PORT}"))
        .arg(format!("-DSTREAM_PORT={STREAM_PORT}"))
        .arg("-o")
        .arg(stage.rootfs().join("bin/step"))
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/escape/step.c"))
        .status();
    assert!(compiled.expect("gcc must be installed").success(), "step.c does not compile");
    stage.edit(|config| {
        let sets = ["bounding", "effective", "permitted"].map(|set| (set, json!(CAPABILITIES)));
        config["process"]["capabilities"] = json!(std::collections::BTreeMap::from(sets));
        config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/proc/sysrq-trigger"]);
    });
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    let said = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{said}{}", errors(&output));
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), ATTEMPTS, "{said}");
    let open: Vec<_> = lines.iter().filter(|line| !line.ends_with(": refused")).collect();
    assert!(open.is_empty(), "{open:#?}");
    assert!(stage.is_clean(), "something is left behind: {}", errors(&output));
}
