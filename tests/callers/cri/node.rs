//! A Kubernetes node as far as its container runtime: a containerd of the stage's own, with kiln as
//! the handler of a runtime class, images and a pod network; and pods on it.

use std::fs;
use std::path::Path;

use prost::Message;

use super::client::{ADDRESS, Refusal, call};
use super::messages::{
    ContainerConfig, ContainerFilter, ContainerMetadata, ContainerStatus, ContainerStatusResponse,
    CreateContainerRequest, ExecSyncRequest, ExecSyncResponse, Id, ImageSpec, LinuxContainerConfig,
    LinuxContainerResources, LinuxContainerSecurityContext, LinuxPodSandboxConfig,
    LinuxSandboxSecurityContext, ListContainersRequest, ListContainersResponse, Mount,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, PodSandboxStatus,
    PodSandboxStatusResponse, RunPodSandboxRequest, SecurityProfile, StatusResponse,
    StopContainerRequest, namespace, state,
};
use crate::image::{Image, NAME, PAUSE};
use crate::stage::{Daemon, Stage, documented, eventually, write};

/// What is configured beside the runtime class: the stage's folders and images; whoever is root on test
/// machines may not lower a process's score for the out-of-memory killer.
const MACHINE: &str = r#"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "PAUSE"
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = "/etc/cni/net.d"
[grpc]
address = "ADDRESS"
"#;

/// The pods' network: the plugins that nodes without a network of their own have.
const NETWORK: &str = r#"{
  "cniVersion": "0.3.1", "name": "pods",
  "plugins": [{
    "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
    "ipam": {
      "type": "host-local", "ranges": [[{"subnet": "10.88.7.0/24"}]],
      "routes": [{"dst": "0.0.0.0/0"}], "dataDir": "/run/cni"
    }
  }]
}"#;

/// Where containerd has kiln keep the state of pods.
const ROOT: &str = "/run/containerd/runc/k8s.io";

/// Where containers of pods have their volume.
pub const VOLUME: &str = "/run/volume";

/// What a kubelet hides from every container that is not privileged.
const MASKED: [&str; 9] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

/// What it has them read only.
const READ_ONLY: [&str; 6] =
    ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// The node.
pub struct Node<'a> {
    pub stage: &'a Stage,
    _containerd: Daemon,
}

impl<'a> Node<'a> {
    /// Starts containerd; gives it with its images and its network ready.
    pub fn new(stage: &'a Stage) -> Self {
        write("/etc/cni/net.d/10-pods.conflist", NETWORK);
        let config = format!(
            "root = \"{}\"\nstate = \"/run/containerd\"\n{}\n{}",
            stage.path("containerd").display(),
            documented("/etc/containerd/config.toml"),
            MACHINE.replace("PAUSE", PAUSE).replace("ADDRESS", ADDRESS),
        );
        write("/etc/containerd/config.toml", &config);
        let _containerd = stage.start(&["containerd", "--config", "/etc/containerd/config.toml"]);
        eventually("an answer of containerd", || {
            stage.run(&["ctr", "--address", ADDRESS, "version"]).status.success()
        });
        let archive = Image::for_pods(stage).archive();
        let import = ["--namespace", "k8s.io", "images", "import", &archive];
        stage.ok(&[&["ctr", "--address", ADDRESS], &import[..]].concat());
        eventually("a runtime and a network that are ready", || {
            let answer = ask::<StatusResponse>("Status", &());
            answer.status.expect("status").conditions.iter().all(|condition| condition.status)
        });
        for directory in [logs(stage).as_str(), VOLUME] {
            fs::create_dir_all(directory).expect("directory");
        }
        Self { stage, _containerd }
    }

    /// A pod without anything that Kubernetes doesn't give every pod, to be changed.
    pub fn pod_config(&self) -> PodSandboxConfig {
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: "pod".to_owned(),
                uid: "uid".to_owned(),
                namespace: "default".to_owned(),
            }),
            hostname: "podname".to_owned(),
            log_directory: logs(self.stage),
            annotations: [].into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: "/kiln-pods".to_owned(),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(own_processes()),
                    seccomp: Some(SecurityProfile::RUNTIME_DEFAULT),
                    ..Default::default()
                }),
                ..Default::default()
            }),
        }
    }

    /// Runs a pod's sandbox.
    pub fn run(&self, config: PodSandboxConfig) -> Result<Pod<'_>, Refusal> {
        let request = RunPodSandboxRequest {
            config: Some(config.clone()),
            runtime_handler: "kiln".to_owned(),
        };
        let sandbox = call::<Id>("RunPodSandbox", &request)?.id;
        Ok(Pod { stage: self.stage, sandbox, config })
    }

    /// Runs the sandbox of a pod that has nothing special.
    pub fn pod(&self) -> Pod<'_> {
        self.run(self.pod_config()).unwrap_or_else(|refusal| panic!("RunPodSandbox: {refusal}"))
    }
}

/// Namespaces as a pod's containers have them: its network and IPC, and processes of their own.
fn own_processes() -> NamespaceOption {
    NamespaceOption { pid: namespace::CONTAINER, ..Default::default() }
}

fn logs(stage: &Stage) -> String {
    stage.path("logs").display().to_string()
}

impl ContainerConfig {
    /// What the kernel is asked to restrict.
    pub fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    /// What the container may take.
    pub fn resources(&mut self) -> &mut LinuxContainerResources {
        self.linux.get_or_insert_default().resources.get_or_insert_default()
    }
}

/// Calls a method that succeeds.
pub fn ask<A: Message + Default>(method: &str, request: &impl Message) -> A {
    call(method, request).unwrap_or_else(|refusal| panic!("{method}: {refusal}"))
}

/// A request that names something.
pub fn of(id: &str) -> Id {
    Id { id: id.to_owned() }
}

/// A pod.
pub struct Pod<'a> {
    stage: &'a Stage,
    /// Its sandbox's id.
    pub sandbox: String,
    config: PodSandboxConfig,
}

impl Pod<'_> {
    /// A container that runs a script, to be changed. The pod's volume is at `/volume`.
    pub fn container(&self, name: &str, script: &str) -> ContainerConfig {
        ContainerConfig {
            metadata: Some(ContainerMetadata { name: name.to_owned() }),
            image: Some(ImageSpec { image: NAME.to_owned() }),
            command: ["sh", "-c", script].map(str::to_owned).into(),
            mounts: vec![Mount {
                container_path: "/volume".to_owned(),
                host_path: VOLUME.to_owned(),
                readonly: false,
            }],
            log_path: format!("{name}.log"),
            linux: Some(LinuxContainerConfig {
                resources: None,
                security_context: Some(LinuxContainerSecurityContext {
                    namespace_options: Some(own_processes()),
                    masked_paths: MASKED.map(str::to_owned).into(),
                    readonly_paths: READ_ONLY.map(str::to_owned).into(),
                    seccomp: Some(SecurityProfile::RUNTIME_DEFAULT),
                    ..Default::default()
                }),
            }),
            ..Default::default()
        }
    }

    /// Creates a container.
    pub fn create(&self, config: ContainerConfig) -> Result<String, Refusal> {
        let request = CreateContainerRequest {
            pod_sandbox_id: self.sandbox.clone(),
            config: Some(config),
            sandbox_config: Some(self.config.clone()),
        };
        Ok(call::<Id>("CreateContainer", &request)?.id)
    }

    /// Creates and starts a container; gives its id.
    pub fn start(&self, config: ContainerConfig) -> Result<String, Refusal> {
        let id = self.create(config)?;
        call::<()>("StartContainer", &of(&id))?;
        Ok(id)
    }

    /// Starts a container that runs a script; gives its id.
    pub fn run(&self, name: &str, script: &str) -> String {
        let started = self.start(self.container(name, script));
        started.unwrap_or_else(|refusal| panic!("{name}: {refusal}"))
    }

    /// Runs a container to its end; gives its exit code and its output.
    pub fn output(&self, config: ContainerConfig) -> (i32, String) {
        let name = config.metadata.clone().unwrap_or_default().name;
        let id = self.start(config).unwrap_or_else(|refusal| panic!("{name}: {refusal}"));
        let code = self.end(&id).exit_code;
        (code, self.log(&name))
    }

    /// Waits for a container's end.
    pub fn end(&self, id: &str) -> ContainerStatus {
        eventually("the container's end", || container_status(id).state == state::EXITED);
        container_status(id)
    }

    /// What a container wrote to both streams.
    pub fn log(&self, name: &str) -> String {
        let lines = self.log_of(name);
        lines.into_iter().map(|(_, line)| line + "\n").collect()
    }

    /// The lines of a container's log, with the stream that each was written to.
    pub fn log_of(&self, name: &str) -> Vec<(String, String)> {
        let path = Path::new(&self.config.log_directory).join(format!("{name}.log"));
        let log = fs::read_to_string(path).expect("log");
        // The time, the stream, whether the line is whole, the line.
        let parsed = log.lines().map(|line| {
            let mut parts = line.splitn(4, ' ').skip(1);
            let mut next = || parts.next().expect("a line of a log").to_owned();
            let stream = next();
            assert_eq!(next(), "F", "{line}");
            (stream, next())
        });
        parsed.collect()
    }

    /// The states of its containers.
    pub fn states(&self) -> Vec<(String, i32)> {
        let filter = ContainerFilter { pod_sandbox_id: self.sandbox.clone() };
        let request = ListContainersRequest { filter: Some(filter) };
        let all = ask::<ListContainersResponse>("ListContainers", &request).containers;
        all.into_iter().map(|container| (container.id, container.state)).collect()
    }

    /// The process on the host that stands for a container.
    pub fn pid_of(&self, id: &str) -> u64 {
        let state = self.stage.ok(&["kiln", "--root", ROOT, "state", id]);
        let state: serde_json::Value = serde_json::from_str(&state).expect("JSON");
        state["pid"].as_u64().expect("a number")
    }

    /// Its sandbox's status.
    pub fn status(&self) -> PodSandboxStatus {
        let answer = ask::<PodSandboxStatusResponse>("PodSandboxStatus", &of(&self.sandbox));
        answer.status.expect("status")
    }

    /// Ends and removes it with its containers; nothing of it is left.
    pub fn remove(self) {
        for (id, found) in self.states() {
            if found == state::RUNNING {
                stop(&id, 0);
            }
            ask::<()>("RemoveContainer", &of(&id));
        }
        ask::<()>("StopPodSandbox", &of(&self.sandbox));
        ask::<()>("RemovePodSandbox", &of(&self.sandbox));
        assert_eq!(self.stage.ok(&["kiln", "--root", ROOT, "list", "--quiet"]), "");
        let processes = self.stage.ok(&["busybox", "ps", "-o", "comm"]);
        assert!(!processes.lines().any(|name| name.starts_with("kiln")), "{processes}");
        let mounts = fs::read_to_string("/proc/mounts").expect("mounts");
        assert!(!mounts.contains(&self.sandbox), "{mounts}");
    }
}

/// Ends a container, by force after some seconds.
pub fn stop(id: &str, timeout: i64) {
    ask::<()>("StopContainer", &StopContainerRequest { container_id: id.to_owned(), timeout });
}

/// A container's status.
pub fn container_status(id: &str) -> ContainerStatus {
    ask::<ContainerStatusResponse>("ContainerStatus", &of(id)).status.expect("status")
}

/// Runs a script in a container; gives exit code, output and errors.
pub fn exec(id: &str, script: &str) -> (i32, String, String) {
    let done = exec_within(id, script, 60).unwrap_or_else(|refusal| panic!("{script}: {refusal}"));
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    (done.exit_code, text(done.stdout), text(done.stderr))
}

/// Runs a script in a container within some seconds.
pub fn exec_within(id: &str, script: &str, timeout: i64) -> Result<ExecSyncResponse, Refusal> {
    let cmd = ["sh", "-c", script].map(str::to_owned).into();
    call("ExecSync", &ExecSyncRequest { container_id: id.to_owned(), cmd, timeout })
}
