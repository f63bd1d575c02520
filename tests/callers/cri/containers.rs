//! A container's life: what it is asked to do, what is said of it, and its end.

use std::path::Path;

use super::client::{Refusal, call};
use super::messages::{
    ContainerStatsResponse, LinuxContainerResources, UpdateContainerResourcesRequest, state,
};
use super::node::{Node, ask, container_status, exec, exec_within, of, stop};
use crate::stage::{eventually, on_stage};

#[test]
fn programs_are_run_in_a_container() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let id = pod.run("main", "exec sleep 1000");
        let done = exec(&id, "echo out; echo err >&2; hostname; exit 9");
        assert_eq!(done, (9, "out\npodname\n".to_owned(), "err\n".to_owned()));
        let refusal = exec_within(&id, "echo late; exec sleep 1000", 1).expect_err("a time-out");
        assert_eq!(refusal.code, Refusal::DEADLINE_EXCEEDED, "{refusal}");
        let (_, processes, _) = exec(&id, "ps -o args");
        assert_eq!(processes.matches("sleep 1000").count(), 1, "{processes}");
        // More than a pipe holds.
        let (code, output, _) = exec(&id, "yes 0123456789 | head -c 500000");
        assert_eq!((code, output.len()), (0, 500_000));
        pod.remove();
    });
}

#[test]
fn containers_end_as_they_are_asked_to_and_status_and_log_tell_how() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let id = pod.run("fine", "echo out; echo err >&2");
        let status = pod.end(&id);
        assert_eq!((status.exit_code, status.reason.as_str()), (0, "Completed"));
        assert!(0 < status.started_at && status.started_at <= status.finished_at, "{status:?}");
        let mut log = pod.log_of("fine");
        log.sort();
        let line = |stream: &str, line: &str| (stream.to_owned(), line.to_owned());
        assert_eq!(log, [line("stderr", "err"), line("stdout", "out")]);
        ask::<()>("RemoveContainer", &of(&id));
        let gone = call::<()>("ContainerStatus", &of(&id)).expect_err("removed");
        assert_eq!(gone.code, Refusal::NOT_FOUND, "{gone}");

        let status = pod.end(&pod.run("bad", "exit 51"));
        assert_eq!((status.exit_code, status.reason.as_str()), (51, "Error"));

        let mut config = pod.container("none", "");
        config.command = vec!["no-such-program".to_owned()];
        let refusal = pod.start(config).expect_err("not found");
        assert!(refusal.message.contains("no-such-program"), "{refusal}");
        assert!(refusal.message.contains("executable file not found in $PATH"), "{refusal}");

        // In its own time, or by force.
        let script = "trap 'echo end; exit 7' TERM; echo up; while :; do sleep 0.1; done";
        let willing = pod.run("willing", script);
        let deaf = pod.run("deaf", "trap '' TERM; echo up; while :; do sleep 0.1; done");
        for name in ["willing", "deaf"] {
            eventually("its trap", || pod.log(name) == "up\n");
        }
        stop(&willing, 100);
        assert_eq!(container_status(&willing).exit_code, 7);
        assert_eq!(pod.log("willing"), "up\nend\n");
        stop(&deaf, 1);
        assert_eq!(container_status(&deaf).exit_code, 137);
        pod.remove();
    });
}

#[test]
fn limits_hold_can_be_changed_and_are_measured() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let mut config = pod.container("main", "exec sleep 1000");
        let limit = LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            cpu_shares: 512,
            memory_limit_in_bytes: 64 << 20,
            oom_score_adj: 900,
        };
        *config.resources() = limit.clone();
        let id = pod.start(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        let limits = "cd /sys/fs/cgroup; cat memory.max cpu.max; cat /proc/1/oom_score_adj";
        assert_eq!(exec(&id, limits).1, "67108864\n50000 100000\n900\n");
        let linux = LinuxContainerResources {
            cpu_quota: 80_000,
            memory_limit_in_bytes: 96 << 20,
            ..limit.clone()
        };
        let update =
            UpdateContainerResourcesRequest { container_id: id.clone(), linux: Some(linux) };
        ask::<()>("UpdateContainerResources", &update);
        assert_eq!(exec(&id, limits).1, "100663296\n80000 100000\n900\n");
        let stats = ask::<ContainerStatsResponse>("ContainerStats", &of(&id)).stats;
        let stats = stats.expect("figures");
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).expect("CPU");
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).expect("memory");
        assert!(cpu.value > 0 && memory.value > 0, "{cpu:?} {memory:?}");

        let mut config = pod.container("greedy", "exec dd if=/dev/zero of=/dev/null bs=256M");
        *config.resources() = LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..limit };
        let id = pod.start(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        let status = pod.end(&id);
        // With version 1 of cgroups containerd isn't woken: see docs/limits.md.
        let version_2 = Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
        let reason = if version_2 { "OOMKilled" } else { "Error" };
        assert_eq!((status.exit_code, status.reason.as_str()), (137, reason));
        assert_eq!(pod.states().iter().filter(|(_, found)| *found == state::RUNNING).count(), 1);
        pod.remove();
    });
}
