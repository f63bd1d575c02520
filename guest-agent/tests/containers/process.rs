//! Identity, privileges and limits of the program.

use kiln_protocol::ExitStatus;
use serde_json::{Value, json};

use crate::guest::{Guest, program, shell};

pub fn status_line(outcome: &str, name: &str) -> String {
    let prefix = format!("{name}:");
    let line = outcome.lines().find_map(|line| line.strip_prefix(&prefix));
    line.unwrap_or_else(|| panic!("no {name} in {outcome}")).trim().to_owned()
}

#[test]
fn user_groups_and_umask_are_applied() {
    let mut guest = Guest::start();
    let mut config = shell("id -u; id -g; id -G; umask; echo $HOME");
    config["process"]["user"] =
        json!({"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027});
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "1000\n1001\n1001 5 7\n0027\n/home/builder\n");
}

#[test]
fn all_five_capability_sets_are_applied() {
    let mut guest = Guest::start();
    let mut config = shell("cat /proc/self/status");
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    config["process"]["capabilities"] = five_sets();
    assert_has_five_sets(&guest.run(&config).stdout);
}

/// Five sets of capabilities of which each is another.
pub fn five_sets() -> Value {
    json!({
        "bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETUID"],
        "permitted": ["CAP_CHOWN", "CAP_KILL"],
        "effective": ["CAP_CHOWN", "CAP_KILL"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL"],
    })
}

/// Checks the `/proc/self/status` of a program of a user with [`five_sets`].
pub fn assert_has_five_sets(status: &str) {
    // CAP_CHOWN is bit 0, CAP_KILL 5, CAP_SETUID 7. Across execve(2) only the ambient set stays
    // permitted and effective for a user that isn't root.
    assert_eq!(status_line(status, "CapBnd"), "00000000000000a1");
    assert_eq!(status_line(status, "CapInh"), "0000000000000020");
    assert_eq!(status_line(status, "CapPrm"), "0000000000000020");
    assert_eq!(status_line(status, "CapEff"), "0000000000000020");
    assert_eq!(status_line(status, "CapAmb"), "0000000000000020");
    assert_eq!(status_line(status, "NoNewPrivs"), "1");
}

#[test]
fn root_without_capabilities_has_none() {
    let mut guest = Guest::start();
    let mut config = shell("cat /proc/self/status");
    config["process"]["capabilities"] = json!({});
    let status = guest.run(&config).stdout;
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status_line(&status, set), "0000000000000000", "{set}");
    }
}

#[test]
fn limits_scores_and_priorities_are_applied() {
    let mut guest = Guest::start();
    let mut config = shell(
        "grep 'open files' /proc/self/limits; cat /proc/self/oom_score_adj; \
         cut -d' ' -f19 /proc/self/stat",
    );
    config["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 77, "hard": 99}]);
    config["process"]["oomScoreAdj"] = json!(321);
    config["process"]["scheduler"] = json!({"policy": "SCHED_OTHER", "nice": 5});
    let outcome = guest.run(&config);
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["Max", "open", "files", "77", "99", "files", "321", "5"]);
}

#[test]
fn names_and_parameters_belong_to_the_container() {
    let mut guest = Guest::start();
    let mut config = shell(
        "hostname; cat /proc/sys/kernel/domainname; cat /proc/sys/net/ipv4/ip_forward; \
         cat /proc/sys/kernel/msgmax; ip addr show lo | grep -c 127.0.0.1",
    );
    config["domainname"] = json!("example");
    config["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel.msgmax": "12345"});
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "step\nexample\n1\n12345\n1\n");
}

#[test]
fn environment_arguments_and_directory_are_the_configured_ones() {
    let mut guest = Guest::start();
    let mut config = shell("pwd; echo $ANSWER; echo $HOME");
    config["process"]["env"] = json!(["PATH=/bin", "ANSWER=42", "HOME=/elsewhere"]);
    config["process"]["cwd"] = json!("/made/for/this");
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "/made/for/this\n42\n/elsewhere\n");
}

#[test]
fn no_descriptor_or_signal_setting_of_the_agent_reaches_the_program() {
    let mut guest = Guest::start();
    let outcome = guest.run(&program(&["/bin/ls", "/proc/self/fd"]));
    // The fourth is the directory that ls reads.
    assert_eq!(outcome.stdout, "0\n1\n2\n3\n");
    let outcome = guest.run(&program(&["/bin/cat", "/proc/self/status"]));
    assert_eq!(status_line(&outcome.stdout, "SigBlk"), "0000000000000000");
    assert_eq!(status_line(&outcome.stdout, "SigIgn"), "0000000000000000");
}

pub fn with_user_namespace(mut config: Value) -> Value {
    let namespaces = config["linux"]["namespaces"].as_array_mut().expect("a list");
    namespaces.push(json!({"type": "user"}));
    let mapping = json!([{"containerID": 0, "hostID": 200000, "size": 65536}]);
    config["linux"]["uidMappings"] = mapping.clone();
    config["linux"]["gidMappings"] = mapping;
    config
}

#[test]
fn user_namespace_has_its_mappings_devices_and_mounts() {
    let mut guest = Guest::start();
    let script = "cat /proc/self/uid_map; id -u; echo x > /dev/null && head -c 4 /dev/zero | wc -c; \
                  stat -c %u /bin/busybox; grep -c ' /sys ' /proc/self/mounts";
    let outcome = guest.run(&with_user_namespace(shell(script)));
    let words: Vec<&str> = outcome.stdout.split_whitespace().collect();
    assert_eq!(words, ["0", "200000", "65536", "0", "4", "65534", "1"], "{}", outcome.stderr);
    assert_eq!(outcome.status, ExitStatus::Code(0));
}

#[test]
fn time_namespace_has_its_offsets() {
    let mut guest = Guest::start();
    let mut config = shell("cut -d. -f1 /proc/uptime");
    config["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({"type": "time"}));
    config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000_000}});
    let uptime: u64 = guest.run(&config).stdout.trim().parse().expect("a number");
    assert!(uptime >= 1_000_000_000, "{uptime}");
}
