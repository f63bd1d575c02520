//! `linux.resources.devices`, by which devices real programs come to open. Everybody here may make
//! nodes.

use serde_json::{Value, json};

use crate::guest::{Guest, shell, shell_process};

/// A script that tries each device that is named with its type, number and redirections, and says
/// which open.
fn attempts(devices: &[(&str, &str, &str)]) -> String {
    let attempt = |(name, number, redirection): &(&str, &str, &str)| {
        format!(
            "rm -f /tmp/n; mknod /tmp/n {number} || echo no node; \
             (: {redirection} /tmp/n) 2>/dev/null && echo {name}\n"
        )
    };
    devices.iter().map(attempt).collect()
}

fn with_rules(script: &str, rules: Value) -> Value {
    let mut config = shell(script);
    config["linux"]["resources"] = json!({"devices": rules});
    config
}

/// A device that whoever may open its node may open.
const TUN: &str = "c 10 200";

#[test]
fn without_rules_only_the_default_devices_open() {
    let mut guest = Guest::start();
    let script = attempts(&[
        ("tun", TUN, "<"),
        ("tun-write", TUN, ">"),
        ("log", "c 1 11", ">"),
        ("console", "c 5 1", ">"),
        ("null", "c 1 3", "<>"),
        ("urandom", "c 1 9", "<"),
    ]);
    for config in [shell(&script), with_rules(&script, json!([{"allow": false, "access": "rwm"}]))]
    {
        let outcome = guest.run(&config);
        assert_eq!(outcome.stdout, "null\nurandom\n", "{}", outcome.stderr);
    }
}

#[test]
fn a_rule_gives_what_it_names_to_every_process_of_the_container() {
    let mut guest = Guest::start();
    let rules = json!([
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "c", "major": 10, "minor": 200, "access": "r"},
    ]);
    let script = attempts(&[("read", TUN, "<"), ("write", TUN, ">"), ("both", TUN, "<>")]);
    guest.run_on(&with_rules("sleep 1000", rules));
    let outcome = guest.exec(&shell_process(&script)).expect("runs");
    assert_eq!(outcome.stdout, "read\n", "{}", outcome.stderr);
}

#[test]
fn everything_can_be_allowed() {
    let mut guest = Guest::start();
    let script = attempts(&[("tun", TUN, "<>"), ("log", "c 1 11", ">")]);
    let all = json!([{"allow": false, "access": "rwm"}, {"allow": true, "access": "rwm"}]);
    let outcome = guest.run(&with_rules(&script, all));
    assert_eq!(outcome.stdout, "tun\nlog\n", "{}", outcome.stderr);
}

#[test]
fn who_may_use_every_device_has_those_that_the_guest_has() {
    let mut guest = Guest::start();
    let script = "ls /dev/tun /dev/disk; : < /dev/tun && echo opens";
    let mut config = with_rules(script, json!([{"allow": true, "access": "rwm"}]));
    config["linux"]["devices"] = json!([
        {"path": "/dev/tun", "type": "c", "major": 10, "minor": 200},
        {"path": "/dev/disk", "type": "b", "major": 8, "minor": 0},
    ]);
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "/dev/tun\nopens\n", "{}", outcome.stderr);

    config["linux"]["resources"] = json!({});
    let refused = guest.fail(&config).message;
    assert!(refused.contains("linux.devices[1]: \"/dev/disk\""), "{refused}");
}

#[test]
fn the_kernel_takes_a_long_list() {
    let mut guest = Guest::start();
    let rules: Vec<_> = (0..2000)
        .map(|index| {
            let kind = if index % 3 == 0 { "b" } else { "c" };
            let access = ["r", "rw", "rwm", "w"][index % 4];
            let (major, minor) = (200 + index % 50, index);
            json!({"allow": index % 5 != 0, "type": kind, "major": major, "minor": minor, "access": access})
        })
        .collect();
    let outcome = guest
        .run(&with_rules(&attempts(&[("tun", TUN, "<"), ("null", "c 1 3", "<")]), json!(rules)));
    assert_eq!(outcome.stdout, "null\n", "{}", outcome.stderr);
}
