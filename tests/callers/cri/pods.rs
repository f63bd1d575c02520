//! What a pod is to its containers.

use super::messages::{
    LinuxContainerResources, NamespaceOption, PodSandboxStatsResponse, namespace, state,
};
use super::node::{Node, ask, container_status, exec, of, stop};
use crate::stage::{Stage, eventually, on_stage};

#[test]
fn containers_of_a_pod_share_a_machine_its_network_and_its_volumes() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let address = pod.status().network.expect("network").ip;
        assert!(address.starts_with("10.88.7."), "{address}");
        let server = pod.run("server", "mkfifo /volume/pipe; exec nc -ll -p 5000 -e cat");
        let script =
            "hostname; until echo over | nc 127.0.0.1 5000 2> /dev/null; do sleep 0.1; done
            ip -o -4 addr show eth0 | grep -o '10.88.7.[0-9]*/24'
            cat /etc/hostname; touch /dev/shm/x && echo shm
            ping -c 1 -W 60 10.88.7.1 > /dev/null && echo out; exit 20";
        let (code, log) = pod.output(pod.container("client", script));
        let expected = format!("podname\nover\n{address}/24\npodname\nshm\nout\n");
        assert_eq!((code, log), (20, expected));
        assert_eq!(machines(stage), 1);
        let (_, seen, _) = exec(&server, "ls /dev/shm; ls -F /volume");
        assert_eq!(seen, "x\npipe|\n");
        let stats = ask::<PodSandboxStatsResponse>("PodSandboxStats", &of(&pod.sandbox));
        let stats = stats.stats.and_then(|stats| stats.linux).expect("figures");
        let memory = stats.memory.as_ref().and_then(|memory| memory.working_set_bytes.as_ref());
        let memory = memory.expect("memory");
        // The machine's, whose kernel alone takes more than this.
        assert!(memory.value > 16 << 20, "{memory:?}");
        assert_eq!(stats.containers.len(), 2, "{stats:?}");
        pod.remove();
    });
}

#[test]
fn pod_of_the_hosts_namespaces_has_those_of_its_guest() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let mut config = node.pod_config();
        // As a kubelet does it: the host's name is the pod's.
        config.hostname.clear();
        let security = config.linux.as_mut().and_then(|linux| linux.security_context.as_mut());
        let of_host = NamespaceOption {
            network: namespace::NODE,
            pid: namespace::NODE,
            ipc: namespace::NODE,
            ..Default::default()
        };
        security.expect("security").namespace_options = Some(of_host.clone());
        let pod = node.run(config.clone()).unwrap_or_else(|refusal| panic!("{refusal}"));
        let container = |name: &str, script: &str| {
            let mut container = pod.container(name, script);
            container.security().namespace_options = Some(of_host.clone());
            container
        };
        let server = container("server", "exec nc -ll -p 5000 -e cat");
        let server = pod.start(server).unwrap_or_else(|refusal| panic!("server: {refusal}"));
        let script = "until echo over | nc 127.0.0.1 5000 2> /dev/null; do sleep 0.1; done; ls /sys/class/net
            tr '\\0' ' ' < /proc/1/cmdline; echo";
        let found = pod.output(container("client", script));
        assert_eq!(found, (0, "over\nlo\nsleep 1000000 \n".to_owned()));
        assert_eq!(container_status(&server).state, state::RUNNING);
        pod.remove();
    });
}

#[test]
fn machines_are_as_a_pods_limits_and_annotations_want_them() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let mut config = node.pod_config();
        let linux = config.linux.as_mut().expect("linux");
        linux.resources = Some(LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 100_000,
            memory_limit_in_bytes: 320 << 20,
            ..Default::default()
        });
        let pod = node.run(config.clone()).unwrap_or_else(|refusal| panic!("{refusal}"));
        let script = "nproc; grep MemTotal /proc/meminfo | grep -o '[0-9]*'";
        let (_, found) = pod.output(pod.container("main", script));
        let found: Vec<u64> = found.lines().map(|line| line.parse().expect("a number")).collect();
        // In KiB; the guest's kernel and agent have their own beside the pod's.
        assert!(found[0] == 1 && (320 << 10..512 << 10).contains(&found[1]), "{found:?}");
        pod.remove();

        config.annotations = [("io.kiln.machine".to_owned(), "container".to_owned())].into();
        let pod = node.run(config).unwrap_or_else(|refusal| panic!("{refusal}"));
        pod.run("first", "ping -c 1 -W 60 10.88.7.1 > /dev/null && echo out; exec sleep 1000");
        eventually("an answer", || pod.log("first") == "out\n");
        assert_eq!(machines(stage), 2);
        pod.remove();
    });
}

/// How many machines there are: each has a process that serves files.
fn machines(stage: &Stage) -> usize {
    let processes = stage.ok(&["busybox", "ps", "-o", "comm"]);
    processes.lines().filter(|name| *name == "kiln-fs").count()
}

#[test]
fn end_of_a_pod_is_that_of_its_containers() {
    on_stage(|stage| {
        let node = Node::new(stage);
        let pod = node.pod();
        let first = pod.run("first", "exec sleep 1000");
        let second = pod.run("second", "exec sleep 1000");
        stop(&first, 0);
        let states = [(first.clone(), state::EXITED), (second.clone(), state::RUNNING)];
        let mut found = pod.states();
        found.sort_by_key(|(id, _)| *id != first);
        assert_eq!(found, states);

        // That of a container by force is no one else's, and the pod keeps its network.
        let third = pod.run("third", "exec sleep 1000");
        stage.ok(&["kill", "-KILL", &pod.pid_of(&third).to_string()]);
        assert_eq!(pod.end(&third).exit_code, 137);
        ask::<()>("RemoveContainer", &of(&third));
        let (code, ..) = exec(&second, "ping -c 1 -W 60 10.88.7.1");
        assert_eq!(code, 0);
        ask::<()>("StopPodSandbox", &of(&pod.sandbox));
        assert_eq!(container_status(&second).state, state::EXITED);
        assert_eq!(container_status(&second).exit_code, 137);
        assert_ne!(pod.status().state, 0, "it is ready no more");
        pod.remove();
    });
}
