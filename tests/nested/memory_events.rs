//! A kill for want of memory, counted in a cgroup that has memory enough.

use std::fs;
use std::process::Command;

use crate::host::{CGROUPS, read, within};

#[test]
fn a_kill_is_counted_where_the_memory_belongs_and_not_where_it_ran_out() {
    within(
        "memory_events::a_kill_is_counted_where_the_memory_belongs_and_not_where_it_ran_out",
        || {
            fs::write(format!("{CGROUPS}/cgroup.subtree_control"), "+memory").expect("passed on");
            for cgroup in ["container", "full"] {
                fs::create_dir(format!("{CGROUPS}/{cgroup}")).expect("made");
            }
            fs::write(format!("{CGROUPS}/full/memory.max"), "0").expect("limited");
            fs::write("/tmp/config", r#"{"processes": 4}"#).expect("written");
            // A score that spares the container spares nobody here.
            let script = "echo $$ >container/cgroup.procs; echo -1000 >/proc/self/oom_score_adj
            exec \"$0\" oom-victim --config-fd 3 3</tmp/config 4>full/cgroup.procs";
            let mut kiln = Command::new("sh");
            kiln.args(["-c", script, env!("CARGO_BIN_EXE_kiln")]).current_dir(CGROUPS);
            let output = kiln.output().expect("sh");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));

            let count = |cgroup: &str, event: &str| {
                let text = read(cgroup, "memory.events");
                let count =
                    text.lines().find_map(|line| line.strip_prefix(event)?.strip_prefix(' '));
                count.expect("a count").to_owned()
            };
            assert_eq!(count("/container", "oom_kill"), "1");
            assert_eq!(count("/container", "oom"), "0");
            assert_eq!(count("/full", "oom_kill"), "0");
            for cgroup in ["container", "full"] {
                assert_eq!(read(&format!("/{cgroup}"), "cgroup.procs"), "");
                fs::remove_dir(format!("{CGROUPS}/{cgroup}")).expect("nothing is left in it");
            }
        },
    );
}
