//! What takes cgroup controllers: limits, their changes, figures, memory that runs out.
//!
//! Where this machine's unified hierarchy has no controllers, each test boots a guest and runs there.

use kiln_protocol::{Answer, ExitStatus, FromAgent, Question, Statistics};
use serde_json::{Value, json, value::to_raw_value};

use crate::booted;
use crate::guest::{Guest, cgroup_root, shell, shell_process};

/// Runs a test of this module where there are controllers.
fn controlled(name: &str, test: fn(Guest)) {
    let controllers = std::fs::read_to_string(cgroup_root().join("cgroup.controllers"));
    if controllers.expect("controllers").contains("memory") {
        return test(Guest::start());
    }
    booted::passes(&format!("controlled::{name}"));
}

fn statistics(guest: &mut Guest) -> Statistics {
    match guest.ask(Question::Statistics) {
        Answer::Statistics(statistics) => *statistics,
        other => panic!("{other:?}"),
    }
}

fn update(guest: &mut Guest, resources: Value) -> Answer {
    let resources = to_raw_value(&resources).expect("resources");
    guest.ask(Question::Update { resources })
}

fn limit_of(guest: &mut Guest, file: &str) -> String {
    let process = shell_process(&format!("cat /sys/fs/cgroup/{file}"));
    guest.exec(&process).expect("runs").stdout.trim().to_owned()
}

fn limited(script: &str) -> Value {
    let mut config = shell(script);
    config["linux"]["resources"] = json!({
        "memory": {"limit": 64 << 20}, "pids": {"limit": 50}, "cpu": {"quota": 50000},
    });
    config
}

#[test]
fn figures_grow_with_what_a_container_does() {
    controlled("figures_grow_with_what_a_container_does", |mut guest| {
        guest.run_on(&limited("sleep 1000 & sleep 1000"));
        let before = loop {
            let now = statistics(&mut guest);
            if now.pids.current >= 2 {
                break now;
            }
        };
        assert_eq!(before.memory.limit, Some(64 << 20));
        assert_eq!(before.pids.limit, Some(50));
        assert!(before.memory.current > 0 && before.memory.peak >= Some(before.memory.current));
        let work = "dd if=/dev/zero of=/dev/shm/x bs=1M count=20 2>/dev/null; \
                    i=0; while [ $i -lt 3000 ]; do i=$((i+1)); done";
        guest.exec(&shell_process(work)).expect("runs");
        let after = statistics(&mut guest);
        assert!(after.cpu.usage_usec > before.cpu.usage_usec);
        assert!(after.cpu.user_usec > 0 && after.cpu.nr_periods > before.cpu.nr_periods);
        assert!(after.memory.stat["shmem"] >= 20 << 20, "{after:?}");
        assert!(after.memory.stat["pgfault"] > before.memory.stat["pgfault"]);
        assert!(after.memory.kernel > Some(0));
        for pressure in [after.cpu_pressure, after.memory_pressure, after.io_pressure] {
            assert!(pressure.is_some(), "{after:?}");
        }
        guest.kill();
    });
}

#[test]
fn update_takes_effect_as_a_whole_or_not_at_all() {
    controlled("update_takes_effect_as_a_whole_or_not_at_all", |mut guest| {
        guest.run_on(&limited("sleep 1000"));
        let changes = [
            (json!({"memory": {"limit": 128 << 20}}), "memory.max", "134217728"),
            (json!({"memory": {"reservation": 1 << 20}}), "memory.low", "1048576"),
            (json!({"cpu": {"period": 200_000}}), "cpu.max", "50000 200000"),
            (json!({"cpu": {"quota": -1}}), "cpu.max", "max 200000"),
            (json!({"cpu": {"shares": 2}}), "cpu.weight", "1"),
            (json!({"cpu": {"cpus": "0"}}), "cpuset.cpus", "0"),
            (json!({"pids": {"limit": 20}}), "pids.max", "20"),
            (json!({"blockIO": {"weight": 1000}}), "io.weight", "default 10000"),
            (json!({"unified": {"memory.high": "100000000"}}), "memory.high", "99999744"),
            (json!({}), "memory.max", "134217728"),
        ];
        for (resources, file, value) in changes {
            assert_eq!(update(&mut guest, resources.clone()), Answer::Done, "{resources}");
            assert_eq!(limit_of(&mut guest, file), value, "{resources}");
        }
        // The kernel takes the first of each and not the second.
        for (resources, field) in [
            (json!({"memory": {"limit": 32 << 20}, "cpu": {"period": 1}}), "cpu.quota"),
            (
                json!({"memory": {"limit": 32 << 20}, "unified": {"cpu.weight": "x"}}),
                "unified (cpu.weight)",
            ),
            (json!({"memory": {"limit": 32 << 20}, "unified": {"no.file": "1"}}), "no.file"),
            (json!({"memory": {"limit": 4096, "checkBeforeUpdate": true}}), "memory.limit"),
        ] {
            match update(&mut guest, resources.clone()) {
                Answer::Refused(why) => assert!(why.contains(field), "{resources}: {why}"),
                other => panic!("{resources}: {other:?}"),
            }
            assert_eq!(limit_of(&mut guest, "memory.max"), "134217728", "{resources}");
            assert_eq!(limit_of(&mut guest, "cpu.weight"), "1", "{resources}");
        }
        guest.kill();
    });
}

#[test]
fn kills_for_want_of_memory_are_reported_while_the_container_lives() {
    controlled("kills_for_want_of_memory_are_reported_while_the_container_lives", |mut guest| {
        guest.run_on(&limited("sleep 1000"));
        let hog = shell_process("head -c 200000000 /dev/zero | tail -c 190000000 > /dev/null");
        let mut known = 0;
        for _ in 0..2 {
            let exec = guest.send_quiet_exec(&hog);
            let mut ended = false;
            let before = known;
            while !ended || known == before {
                match guest.receive() {
                    FromAgent::OomKilled { container, kills } => {
                        assert_eq!(container, "c");
                        assert!(kills > known, "{kills} after {known}");
                        known = kills;
                    }
                    FromAgent::ExecExited { exec: of, .. } if of == exec => ended = true,
                    FromAgent::ExecStarted { .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        assert_eq!(statistics(&mut guest).memory.events.oom_kill, known);
        guest.signal(None, libc::SIGKILL, true);
        match guest.receive() {
            FromAgent::Exited { oom_killed, .. } => assert!(oom_killed),
            other => panic!("{other:?}"),
        }
    });
}

#[test]
fn container_that_the_kernel_kills_is_reported_as_such_before_its_end() {
    controlled(
        "container_that_the_kernel_kills_is_reported_as_such_before_its_end",
        |mut guest| {
            let mut config = limited("exec tail -c 190000000 /dev/zero");
            config["linux"]["resources"]["memory"]["limit"] = json!(16 << 20);
            guest.run_on(&config);
            assert!(matches!(guest.receive(), FromAgent::OomKilled { kills: 1.., .. }));
            match guest.receive() {
                FromAgent::Exited { status, oom_killed: true, .. } => {
                    assert_eq!(status, ExitStatus::Signal(libc::SIGKILL as u8));
                }
                other => panic!("{other:?}"),
            }
        },
    );
}
