//! A stand-in for the guest and its host: a process with a mount namespace of its own in which the
//! agent serves one test, and the test's side of the connections.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use std::{fs, thread};

use kiln_agent::cgroup::Hierarchy;
use kiln_agent::server::{Agent, Environment};
use kiln_protocol::frame::{self, Decoder};
use kiln_protocol::{
    Answer, BindMount, CreateContainer, ExecId, ExecProcess, ExitStatus, FailurePhase, FromAgent,
    Joined, MAX_FROM_AGENT, MAX_TO_AGENT, Network, Question, Stdio, StreamHeader, StreamToken,
    ToAgent, VERSION, WindowSize,
};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use serde_json::{Value, json};

use crate::booted;

/// How long anything may take before a test is given up.
const PATIENCE: Duration = Duration::from_secs(60);

/// The agent in its namespaces, and what the test holds of it.
pub struct Guest {
    pid: Pid,
    control: UnixStream,
    decoder: Decoder,
    pub directory: tempfile::TempDir,
    cgroup: PathBuf,
    next_token: AtomicU64,
    next_exec: u32,
    next_request: u32,
    /// What a container is started with.
    pub network: Option<Box<Network>>,
}

/// Two outputs that are being read.
pub struct Outputs([thread::JoinHandle<String>; 2]);

impl Outputs {
    /// Waits for their end.
    pub fn outcome(self, status: ExitStatus) -> Outcome {
        let [stdout, stderr] = self.0.map(|reader| reader.join().expect("reader"));
        Outcome { status, stdout, stderr }
    }
}

pub fn is_started(message: &FromAgent, wanted: ExecId) -> bool {
    matches!(message, FromAgent::ExecStarted { exec, .. } if *exec == wanted)
}

/// How a program ended and what it wrote.
#[derive(Debug)]
pub struct Outcome {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

/// A failure that the agent reported.
#[derive(Debug)]
pub struct Refusal {
    pub phase: FailurePhase,
    pub message: String,
    pub exit_code: u8,
}

impl Guest {
    /// Starts the agent with busybox as the share's root file system.
    pub fn start() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests need root");
        let directory = tempfile::tempdir().expect("temporary directory");
        make_rootfs(&directory.path().join("share/rootfs"));
        for name in ["devices", "mount-point", "share/mounts"] {
            fs::create_dir_all(directory.path().join(name)).expect("directory");
        }
        // Users of other user namespaces pass through here on their way to the device nodes.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        let cgroup = cgroup_root().join(format!("kiln-agent-test-{}", std::process::id()));
        fs::create_dir_all(&cgroup).expect("cgroup");
        let controllers = fs::read_to_string(cgroup.join("cgroup.controllers")).expect("list");
        for controller in controllers.split_whitespace() {
            let enable = cgroup.join("cgroup.subtree_control");
            fs::write(enable, format!("+{controller}")).expect("controller");
        }
        let listener = UnixListener::bind(directory.path().join("streams")).expect("listener");
        let (control, of_agent) = UnixStream::pair().expect("control connection");
        // SAFETY: the test's other thread only waits for this one, so the child finds no lock held.
        let pid = match unsafe { fork() }.expect("fork") {
            ForkResult::Child => {
                drop(control);
                serve(directory.path(), &cgroup, of_agent.into(), listener.into());
            }
            ForkResult::Parent { child } => child,
        };
        control.set_read_timeout(Some(PATIENCE)).expect("timeout");
        let decoder = Decoder::new(MAX_FROM_AGENT);
        let next_token = AtomicU64::new(1);
        let mut guest = Self {
            pid,
            control,
            decoder,
            directory,
            cgroup,
            next_token,
            next_exec: 1000,
            next_request: 1000,
            network: None,
        };
        assert!(matches!(guest.receive(), FromAgent::Hello { protocol: VERSION, .. }));
        guest.send(&ToAgent::Welcome { protocol: VERSION, unix_time_ns: 0, entropy: [0; 32] });
        guest
    }

    pub fn rootfs(&self) -> PathBuf {
        self.directory.path().join("share/rootfs")
    }

    /// Path of a bind mount's source in the share.
    pub fn shared(&self, mount: usize) -> PathBuf {
        self.directory.path().join("share/mounts").join(mount.to_string())
    }

    /// The bind mount of what is there.
    pub fn bind(&self, mount: usize, is_file: bool) -> BindMount {
        BindMount { mount, path: format!("mounts/{mount}"), is_file }
    }

    pub fn send(&mut self, message: &ToAgent) {
        let frame = frame::encode(message, MAX_TO_AGENT).expect("encodes");
        self.control.write_all(&frame).expect("the agent listens");
    }

    pub fn receive(&mut self) -> FromAgent {
        loop {
            if let Some(message) = self.decoder.next().expect("a message") {
                return message;
            }
            let mut bytes = [0; 4096];
            let length = self.control.read(&mut bytes).expect("the agent answers in time");
            assert!(length > 0, "the agent closed the connection");
            self.decoder.push(&bytes[..length]);
        }
    }

    pub fn token(&self) -> StreamToken {
        StreamToken(self.next_token.fetch_add(1, Ordering::Relaxed))
    }

    /// Connects a stream, as the host does.
    pub fn connect(&self, token: StreamToken) -> UnixStream {
        let stream = UnixStream::connect(self.directory.path().join("streams")).expect("connects");
        stream.set_read_timeout(Some(PATIENCE)).expect("timeout");
        (&stream).write_all(&StreamHeader { token }.to_bytes()).expect("header");
        stream
    }

    pub fn create(&mut self, config: &Value, binds: Vec<BindMount>, stdio: Stdio) {
        self.create_in("c", "rootfs", None, (config, binds, stdio));
    }

    /// Creates a container by any name on any root file system of the share.
    pub fn create_in(
        &mut self,
        container: &str,
        rootfs: &str,
        joined: Option<Joined>,
        (config, binds, stdio): (&Value, Vec<BindMount>, Stdio),
    ) {
        let config = serde_json::value::to_raw_value(config).expect("config");
        let state = json!({"ociVersion": "1.2.0", "id": container, "bundle": "/bundle"});
        let state = serde_json::value::to_raw_value(&state).expect("state");
        let (container, rootfs) = (container.to_owned(), rootfs.to_owned());
        let create = CreateContainer { container, config, state, rootfs, binds, joined, stdio };
        self.send(&ToAgent::Create(Box::new(create)));
    }

    pub fn start_container(&mut self) {
        self.send(&ToAgent::Start { container: "c".to_owned(), network: self.network.clone() });
    }

    /// Creates and starts a container, and waits for its end.
    pub fn run(&mut self, config: &Value) -> Outcome {
        self.run_with(config, Vec::new()).expect("the container runs")
    }

    /// As [`Self::run`], expecting that the agent refuses or fails.
    pub fn fail(&mut self, config: &Value) -> Refusal {
        self.run_with(config, Vec::new()).expect_err("a failure")
    }

    pub fn run_with(&mut self, config: &Value, binds: Vec<BindMount>) -> Result<Outcome, Refusal> {
        let (stdio, outputs) = self.outputs();
        self.create(config, binds, stdio);
        self.expect(|message| matches!(message, FromAgent::Created { .. }))?;
        let outputs = self.read(outputs);
        self.start_container();
        self.expect(|message| matches!(message, FromAgent::Started { .. }))?;
        let status = self.wait();
        Ok(outputs.outcome(status))
    }

    /// Stdio of which both outputs are read.
    pub fn outputs(&self) -> (Stdio, [StreamToken; 2]) {
        let (out, err) = (self.token(), self.token());
        (Stdio::Pipes { stdin: None, stdout: Some(out), stderr: Some(err) }, [out, err])
    }

    /// Reads two outputs to their end.
    pub fn read(&self, outputs: [StreamToken; 2]) -> Outputs {
        Outputs(outputs.map(|token| {
            let mut stream = self.connect(token);
            thread::spawn(move || {
                let mut text = Vec::new();
                stream.read_to_end(&mut text).expect("the stream ends");
                String::from_utf8_lossy(&text).into_owned()
            })
        }))
    }

    /// Creates and starts a container that is to go on.
    pub fn run_on(&mut self, config: &Value) {
        self.create(config, Vec::new(), Stdio::Pipes { stdin: None, stdout: None, stderr: None });
        self.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
        self.start_container();
        self.expect(|message| matches!(message, FromAgent::Started { .. })).expect("started");
    }

    pub fn send_exec(&mut self, exec: ExecId, process: &Value, stdio: Stdio) {
        let process = serde_json::value::to_raw_value(process).expect("process");
        let container = "c".to_owned();
        self.send(&ToAgent::Exec(Box::new(ExecProcess { container, exec, process, stdio })));
    }

    /// Executes a process in the container and waits for its end.
    pub fn exec(&mut self, process: &Value) -> Result<Outcome, Refusal> {
        let exec = ExecId(self.next_exec);
        self.next_exec += 1;
        let (stdio, outputs) = self.outputs();
        self.send_exec(exec, process, stdio);
        self.expect(|message| is_started(message, exec))?;
        let outputs = self.read(outputs);
        match self.receive() {
            FromAgent::ExecExited { exec: ended, status, .. } if ended == exec => {
                Ok(outputs.outcome(status))
            }
            other => panic!("instead of an exec's end: {other:?}"),
        }
    }

    /// Executes a process of which nothing is to be read.
    pub fn send_quiet_exec(&mut self, process: &Value) -> ExecId {
        let exec = ExecId(self.next_exec);
        self.next_exec += 1;
        let stdio = Stdio::Pipes { stdin: None, stdout: None, stderr: None };
        self.send_exec(exec, process, stdio);
        exec
    }

    /// Asks a question and waits for its answer, which comes next.
    pub fn ask(&mut self, question: Question) -> Answer {
        let asked = self.next_request;
        self.next_request += 1;
        self.send(&ToAgent::Ask { request: asked, container: "c".to_owned(), question });
        match self.receive() {
            FromAgent::Answer { request, answer, .. } if request == asked => answer,
            other => panic!("instead of an answer: {other:?}"),
        }
    }

    pub fn signal(&mut self, exec: Option<ExecId>, signal: i32, all: bool) {
        self.send(&ToAgent::Signal { container: "c".to_owned(), exec, signal, all });
    }

    /// Kills the container and waits for its end, and that of its execs.
    pub fn kill(&mut self) {
        self.signal(None, libc::SIGKILL, true);
        loop {
            match self.receive() {
                FromAgent::ExecExited { .. } => {}
                FromAgent::Exited { status, .. } => {
                    assert_eq!(status, ExitStatus::Signal(libc::SIGKILL as u8));
                    return;
                }
                other => panic!("instead of an end: {other:?}"),
            }
        }
    }

    /// Waits for the container's end.
    pub fn wait(&mut self) -> ExitStatus {
        match self.receive() {
            FromAgent::Exited { status, .. } => status,
            other => panic!("instead of an end: {other:?}"),
        }
    }

    pub fn expect(&mut self, wanted: impl Fn(&FromAgent) -> bool) -> Result<(), Refusal> {
        match self.receive() {
            message if wanted(&message) => Ok(()),
            FromAgent::Failed { phase, message, exit_code, .. }
            | FromAgent::ExecFailed { phase, message, exit_code, .. } => {
                Err(Refusal { phase, message, exit_code })
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    /// A container with a terminal: its stream, before it is started.
    pub fn create_with_terminal(&mut self, config: &Value, size: WindowSize) -> UnixStream {
        let stream = self.token();
        self.create(config, Vec::new(), Stdio::Terminal { stream, size });
        self.expect(|message| matches!(message, FromAgent::Created { .. })).expect("created");
        self.connect(stream)
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let frame = frame::encode(&ToAgent::Shutdown, MAX_TO_AGENT).expect("encodes");
        let _ = self.control.write_all(&frame);
        let ended = waitpid(self.pid, None).expect("the agent ends");
        if !thread::panicking() {
            assert_eq!(ended, nix::sys::wait::WaitStatus::Exited(self.pid, 0));
            fs::remove_dir(&self.cgroup).expect("no cgroup is left behind");
        }
    }
}

fn serve(directory: &Path, cgroup: &Path, control: OwnedFd, listener: OwnedFd) -> ! {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).expect("death signal");
    unshare(CloneFlags::CLONE_NEWNS).expect("mount namespace");
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).expect("private mounts");
    let devices = directory.join("devices");
    mount(Some("tmpfs"), &devices, Some("tmpfs"), MsFlags::empty(), none).expect("tmpfs");
    kiln_agent::stream::make_non_blocking(&listener).expect("non-blocking");
    let environment = Environment {
        share: directory.join("share"),
        mount_point: directory.join("mount-point"),
        devices,
        cpus: 1,
        set_clock: |unix_time_ns| {
            if booted::is_guest() {
                // What can't be is the agent's to report.
                let _ = kiln_agent::guest::clock::set(unix_time_ns);
            }
        },
        credit_entropy: |_| (),
    };
    let hierarchy = Hierarchy::at(cgroup.to_owned());
    let agent = Agent::new(environment, hierarchy, control, listener).expect("agent");
    let _ = agent.run();
    // SAFETY: ends this copy of the test's process without running what belongs to the test.
    unsafe { libc::_exit(0) }
}

/// The unified hierarchy of this machine.
pub fn cgroup_root() -> PathBuf {
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts");
    let fields = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let unified = mounts.lines().map(fields).find(|fields| fields[2] == "cgroup2");
    unified.expect("these tests need a cgroup2 mount")[1].clone().into()
}

/// Makes a root file system with busybox.
pub fn make_rootfs(rootfs: &Path) {
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
        fs::create_dir_all(rootfs.join(name)).expect("directory");
    }
    fs::copy("/bin/busybox", rootfs.join("bin/busybox")).expect("these tests need busybox-static");
    let applets = [
        "sh",
        "cat",
        "echo",
        "id",
        "ls",
        "mkdir",
        "stat",
        "mount",
        "head",
        "sleep",
        "kill",
        "true",
        "false",
        "hostname",
        "touch",
        "chmod",
        "chown",
        "readlink",
        "dd",
        "stty",
        "tty",
        "wc",
        "sync",
        "test",
        "env",
        "pwd",
        "grep",
        "umask",
        "rm",
        "nproc",
        "mknod",
        "cut",
        "ip",
        "tr",
        "sed",
        "awk",
        "seq",
        "ps",
        "chroot",
        "sethostname",
        "date",
        "unshare",
    ];
    for applet in applets {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("applet");
    }
    let passwd = "root:x:0:0:root:/root:/bin/sh\nbuilder:x:1000:1000::/home/builder:/bin/sh\n";
    fs::write(rootfs.join("etc/passwd"), passwd).expect("passwd");
}

/// The capabilities that runc's own default configuration gives, and a few more.
const CAPABILITIES: [&str; 8] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETGID",
    "CAP_SETUID",
];

/// A configuration that runs a shell command.
pub fn shell(script: &str) -> Value {
    program(&["/bin/sh", "-c", script])
}

/// The process of an exec that runs a shell command.
pub fn shell_process(script: &str) -> Value {
    shell(script)["process"].take()
}

/// A configuration that runs a program, much like the one that `runc spec` writes.
pub fn program(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/bin:/usr/bin"],
            "cwd": "/",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES
            },
            "noNewPrivileges": true,
        },
        "root": {"path": "rootfs"},
        "hostname": "step",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"}, {"type": "cgroup"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/acpi", "/proc/no-such-file"],
            "readonlyPaths": ["/proc/sys", "/proc/bus"],
        },
    })
}
