//! Steps that compute without end.

use serde_json::json;

use crate::cgroup::{limit, set_path, unique};
use crate::lifecycle::{create, succeeds};
use crate::stage::{Stage, errors, eventually};

#[test]
fn the_hosts_cgroup_slows_the_whole_machine_down() {
    let spin = "while :; do :; done";
    let stage = Stage::new(&["sh", "-c", &format!("({spin}) & {spin}")]);
    let path = unique("spin");
    set_path(&stage, &path);
    stage.edit(|config| {
        config["linux"]["resources"] = json!({"cpu": {"quota": 10_000, "period": 100_000}});
    });
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    let throttled = || {
        let figures = limit("cpu", &path, "cpu.stat", "cpu.stat");
        let count = figures.lines().find_map(|line| line.strip_prefix("nr_throttled "));
        count.expect("a count").parse::<u64>().expect("a number")
    };
    let before = throttled();
    succeeds(&stage, &["start", "test"]);
    eventually("the host's limit being reached", || throttled() > before + 5);
    succeeds(&stage, &["delete", "--force", "test"]);
    assert!(stage.is_clean());
}
