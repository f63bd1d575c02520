//! Containers that see each other's processes: `shareProcessNamespace`, and ephemeral containers, whose
//! target's they see.

use super::messages::{ContainerConfig, NamespaceOption, namespace, state};
use super::node::{Node, Pod, container_status, exec, stop};
use crate::stage::{eventually, on_stage};

/// Has a container live among other processes than its own.
fn among(mut config: ContainerConfig, pid: i32, target: &str) -> ContainerConfig {
    let target_id = target.to_owned();
    config.security().namespace_options =
        Some(NamespaceOption { pid, target_id, ..Default::default() });
    config
}

fn start(pod: &Pod<'_>, config: ContainerConfig) -> String {
    pod.start(config).unwrap_or_else(|refusal| panic!("{refusal}"))
}

#[test]
fn containers_see_the_processes_that_they_are_to_see() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let mut config = node.pod_config();
        let linux = config.linux.as_mut().expect("linux");
        let security = linux.security_context.as_mut().expect("security");
        security.namespace_options =
            Some(NamespaceOption { pid: namespace::POD, ..Default::default() });
        let pod = node.run(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        let shared =
            |name: &str, script: &str| among(pod.container(name, script), namespace::POD, "");
        let main = start(&pod, shared("main", "exec sleep 1001"));
        let script = "sleep 1002 & tr '\\0' ' ' < /proc/1/cmdline; echo
            set -- $(ps -o pid,args | grep '[s]leep 1001'); cat /proc/$1/root/etc/hostname
            echo up; exec sleep 1003";
        let side = start(&pod, shared("side", script));
        eventually("its process", || pod.log("side") == "sleep 1000000 \npodname\nup\n");
        let seen = |id: &str| exec(id, "ps -o args | grep -o '^sleep .*' | sort").1;
        let all = "sleep 1000000\nsleep 1001\nsleep 1002\nsleep 1003\n";
        assert_eq!((seen(&main).as_str(), seen(&side).as_str()), (all, all));

        // What a container leaves behind ends with it; and one may end another's processes.
        let (code, ..) = exec(&main, "set -- $(ps -o pid,args | grep '[s]leep 1003'); kill $1");
        assert_eq!((code, pod.end(&side).exit_code), (0, 143));
        assert_eq!(seen(&main), "sleep 1000000\nsleep 1001\n");

        // One that has processes of its own is looked into.
        let target = pod.run("target", "trap 'exit 7' TERM; sleep 1004 & wait");
        let script = "tr '\\0' ' ' < /proc/1/cmdline | cut -c 1-12; exec sleep 1005";
        let debug = among(pod.container("debug", script), namespace::TARGET, &target);
        let debug = start(&pod, debug);
        eventually("its output", || pod.log("debug") == "sh -c trap '\n");
        assert_eq!(seen(&debug), "sleep 1004\nsleep 1005\n");
        stop(&target, 60);
        assert_eq!(container_status(&target).exit_code, 7);
        assert_eq!(pod.end(&debug).exit_code, 137);
        assert_eq!(container_status(&main).state, state::RUNNING);
        pod.remove();
    });
}
