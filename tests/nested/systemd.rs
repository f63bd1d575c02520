//! systemd as the first process, and scopes that it makes.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use crate::host::{
    CGROUPS, await_end, await_processes, begin, call_off, eventually, expect_pass, is_whole,
    is_within, prepare, read,
};
use crate::stage::{Stage, succeeds};

const NAME: &str = "systemd::the_scope_has_processes_and_limits_and_goes_with_the_container";
const SCOPE: &str = "/test.slice/test-nested.slice/kiln-c1.scope";
const UNIT: &str = "kiln-c1.scope";

/// What systemd starts: the system's bus, which is how it is spoken to, and the test. It ends with that.
const UNITS: [(&str, &str); 3] = [
    (
        "dbus.socket",
        "[Unit]\nDefaultDependencies=no\n[Socket]\nListenStream=/run/dbus/system_bus_socket\n",
    ),
    (
        "dbus.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.socket\n[Service]\nType=notify\n\
         ExecStart=/usr/bin/dbus-daemon --system --address=systemd: --nofork --nopidfile \
         --systemd-activation --syslog-only\n",
    ),
    (
        "kiln-test.service",
        "[Unit]\nDefaultDependencies=no\nRequires=dbus.service\nAfter=dbus.service\n\
         SuccessAction=exit-force\nFailureAction=exit-force\n[Service]\nType=oneshot\n\
         PassEnvironment=PATH KILN_NESTED_WITHIN KILN_NESTED_WHOLE KILN_LIB_DIR\nTimeoutStartSec=infinity\n\
         StandardOutput=append:/output\nStandardError=append:/output\n",
    ),
];

#[test]
fn the_scope_has_processes_and_limits_and_goes_with_the_container() {
    if is_within() {
        return scope();
    }
    let stage = prepare(&["/lib/systemd/systemd", "--unit=kiln-test.service"]);
    let etc = stage.rootfs().join("etc");
    fs::create_dir_all(etc.join("systemd/system")).expect("directory");
    fs::write(etc.join("machine-id"), "0123456789abcdef0123456789abcdef\n").expect("written");
    for (name, text) in UNITS {
        let text =
            text.replace("Type=oneshot", &format!("Type=oneshot\nExecStart=/test --exact {NAME}"));
        fs::write(etc.join("systemd/system").join(name), text).expect("written");
    }
    expect_pass(&stage);
}

/// A property of the scope.
fn property(name: &str) -> String {
    let output = Command::new("systemctl").args(["show", "--value", "-p", name, UNIT]).output();
    String::from_utf8(output.expect("systemctl").stdout).expect("text").trim().to_owned()
}

fn scope() {
    let stage = Stage::new(&["sleep", "100000"]);
    stage.edit(|config| {
        config["linux"]["cgroupsPath"] = json!("test-nested.slice:kiln:c1");
        let namespaces = config["linux"]["namespaces"].as_array_mut();
        namespaces.expect("an array").push(json!({"type": "cgroup"}));
        config["linux"]["resources"] = json!({
            "memory": {"limit": 64 << 20},
            "pids": {"limit": 50},
            "cpu": {"shares": 512, "quota": 150_000, "period": 50_000},
        });
    });
    let command = begin(&stage, &["--systemd-cgroup"]);
    await_processes(&stage, &command, SCOPE);
    assert_eq!(property("ActiveState"), "active");
    assert_eq!(property("ControlGroup"), SCOPE);
    assert_eq!(property("Slice"), "test-nested.slice");
    assert_eq!(property("Delegate"), "yes");
    let total = ((2 * 128 + 256 + 1024u64) << 20).to_string();
    holds(&[
        ("MemoryMax", &total, "memory.max", &total),
        ("TasksMax", "562", "pids.max", "562"),
        ("CPUWeight", "20", "cpu.weight", "20"),
    ]);
    if is_whole() {
        await_end(&stage, command);
        holds(&[("CPUQuotaPerSecUSec", "3s", "cpu.max", "150000 50000")]);
        change(&stage, &total);
        succeeds(&stage, &["delete", "--force", "test"]);
    } else {
        call_off(command);
    }
    assert!(!Path::new(&format!("{CGROUPS}{SCOPE}")).exists());
    eventually("the end of the scope", || property("LoadState") == "not-found");
    assert!(stage.is_clean());
}

fn holds(limits: &[(&str, &str, &str, &str)]) {
    for (name, value, file, text) in limits {
        assert_eq!((&*property(name), &*read(SCOPE, file)), (*value, *text), "{name}");
    }
}

/// systemd hears of changes, and keeps to them.
fn change(stage: &Stage, memory: &str) {
    // What the host's processes run is the host's.
    let impostor = stage.rootfs().join("bin/busctl");
    fs::write(&impostor, "#!/bin/sh\necho > /bin/impostor\n").expect("written");
    fs::set_permissions(&impostor, fs::Permissions::from_mode(0o755)).expect("mode");
    // Its period stays.
    let cpu_time = ["--cpu-quota", "25000"];
    succeeds(stage, &[&["update", "--pids-limit", "60"][..], &cpu_time, &["test"]].concat());
    let changed = [
        ("MemoryMax", memory, "memory.max", memory),
        ("TasksMax", "572", "pids.max", "572"),
        ("CPUQuotaPerSecUSec", "500ms", "cpu.max", "25000 50000"),
    ];
    holds(&changed);
    assert!(!stage.rootfs().join("bin/impostor").exists());
    // systemd writes what it knows.
    assert!(Command::new("systemctl").arg("daemon-reload").status().expect("systemctl").success());
    holds(&changed);
}
