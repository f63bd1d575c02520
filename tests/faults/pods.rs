//! Words that cross the end of a pod's container: what is asked of it on the host may reach the guest
//! after its end, and is answered later still. That is the end of that container only.

use std::fs::{self, File};
use std::process::{Child, Command, Stdio};

use kiln_protocol::{Answer, ExecId, ExitStatus, FailurePhase, FromAgent};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::host::{Host, marked};
use crate::script::{Script, id};
use crate::stage::{Stage, config, errors, eventually, kiln, succeeds};

/// The number of the last question about a container.
const LAST_QUESTION: u32 = u32::MAX;

/// A pod whose agent plays a script. Its sandbox is the container `test`.
struct Pod {
    stage: Stage,
    before: Host,
}

impl Pod {
    fn new(script: &Script) -> Self {
        let stage = marked(&["sleep", "1000"]);
        stage.edit(|config| {
            config["annotations"] = json!({
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "test",
                "io.kubernetes.cri.sandbox-memory": "268435456",
            });
        });
        let before = Host::look(&stage);
        let lib = script.compile(&stage);
        fs::write(stage.path().join("kiln.toml"), format!("lib_dir = {lib:?}\n")).expect("written");
        let pod = Self { stage, before };
        let mut run = pod.kiln();
        run.args(["run", "--detach", "--engine", "emulated", "--bundle"]);
        let began = pod.begins(run.arg(pod.stage.bundle()).arg("test"));
        assert!(began, "{}", pod.said());
        pod
    }

    fn kiln(&self) -> Command {
        let mut command = self.stage.kiln();
        command.arg("--config").arg(self.stage.path().join("kiln.toml"));
        command
    }

    /// Whether a command succeeds whose container keeps the standard streams.
    fn begins(&self, command: &mut Command) -> bool {
        let errors = File::create(self.stage.path().join("errors")).expect("file");
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(errors);
        command.status().expect("kiln").success()
    }

    /// What such a command said.
    fn said(&self) -> String {
        fs::read_to_string(self.stage.path().join("errors")).expect("errors")
    }

    /// Creates and starts the second container.
    fn begin_second(&self) {
        let id = "second";
        let folder = self.stage.path().join(id);
        fs::create_dir_all(folder.join("rootfs")).expect("directory");
        let mut config = config(&["sleep", "1000"]);
        let path = |kind| format!("/proc/{}/ns/{kind}", self.pid("test"));
        config["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "test",
        });
        config["linux"]["namespaces"] = json!([
            {"type": "pid"}, {"type": "mount"},
            {"type": "ipc", "path": path("ipc")},
            {"type": "network", "path": path("net")},
        ]);
        fs::write(folder.join("config.json"), config.to_string()).expect("config.json");
        let mut create = self.kiln();
        let began = self.begins(create.args(["create", "--bundle"]).arg(&folder).arg(id));
        assert!(began, "{}", self.said());
        succeeds(&self.stage, &["start", id]);
    }

    fn pid(&self, id: &str) -> i32 {
        let state: serde_json::Value =
            serde_json::from_str(&succeeds(&self.stage, &["state", id])).expect("JSON");
        i32::try_from(state["pid"].as_i64().expect("a number")).expect("a pid")
    }

    fn exec(&self, id: &str) -> Child {
        let mut exec = self.kiln();
        exec.args(["exec", id, "true"]).stdin(Stdio::null());
        exec.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().expect("kiln")
    }

    fn is(&self, id: &str, status: &str) -> bool {
        let state = kiln(&self.stage, &["state", id]);
        String::from_utf8_lossy(&state.stdout).contains(&format!("\"{status}\""))
    }

    fn end(self) {
        assert!(self.is("test", "running"), "the pod has ended");
        for id in ["test", "second"] {
            succeeds(&self.stage, &["delete", "--force", id]);
        }
        self.before.is_as_before(&self.stage);
    }
}

/// What the agent says of the pod's second container.
fn second() -> String {
    "second".to_owned()
}

fn refusal(request: u32) -> FromAgent {
    let answer = Answer::Refused("container \"second\" does not run".to_owned());
    FromAgent::Answer { container: second(), request, answer }
}

fn killed() -> FromAgent {
    let status = ExitStatus::Signal(15);
    FromAgent::Exited { container: second(), status, oom_killed: false }
}

/// A pod that runs, and a second container in it that is told to start.
fn begun() -> Script {
    set_up(Script::created().say(&FromAgent::Started { container: id() }))
}

/// Answers the create of the second container and reads its start.
fn set_up(script: Script) -> Script {
    script.read().say(&FromAgent::Created { container: second() }).read()
}

#[test]
fn late_answers_about_an_ended_container_are_not_the_end_of_its_pod() {
    let exec_failed = FromAgent::ExecFailed {
        container: second(),
        exec: ExecId(0),
        phase: FailurePhase::Exec,
        message: "container \"second\" does not run".to_owned(),
        exit_code: 255,
    };
    let started = FromAgent::Started { container: second() };
    let script = begun().say(&started);
    // An exec, a signal, and a question for a sign of life; then the last question.
    let script = script.read().read().read().say(&killed()).pause(1);
    let script = script.say(&exec_failed).read().say(&refusal(0)).say(&refusal(LAST_QUESTION));
    // The next of the same id waits until its turn has come. Its monitor dies, for which it is killed.
    let script = set_up(script).say(&started);
    let script = script.read().read().read().say(&killed()).pause(1).say(&refusal(0));
    let script = script.read().say(&refusal(LAST_QUESTION));
    let script = set_up(script).say(&started);
    let pod = Pod::new(&script);

    pod.begin_second();
    let exec = pod.exec("second");
    succeeds(&pod.stage, &["kill", "second", "TERM"]);
    let exec = exec.wait_with_output().expect("ends");
    assert_eq!(exec.status.code(), Some(255), "{}", errors(&exec));
    eventually("its end", || pod.is("second", "stopped"));
    assert!(pod.is("test", "running"), "the pod has ended");
    succeeds(&pod.stage, &["delete", "second"]);

    pod.begin_second();
    succeeds(&pod.stage, &["kill", "second", "TERM"]);
    kill(Pid::from_raw(pod.pid("second")), Signal::SIGKILL).expect("sent");
    eventually("its end", || pod.is("second", "stopped"));
    succeeds(&pod.stage, &["delete", "second"]);

    pod.begin_second();
    pod.end();
}

#[test]
fn start_that_crosses_the_end_of_a_container_is_its_own_end_only() {
    let failed = FromAgent::Failed {
        container: second(),
        phase: FailurePhase::Exec,
        message: "container \"second\" does not exist".to_owned(),
        exit_code: 1,
    };
    let script = begun().say(&killed()).say(&failed).read().say(&refusal(LAST_QUESTION));
    let pod = Pod::new(&script);
    pod.begin_second();
    eventually("its end", || pod.is("second", "stopped"));
    succeeds(&pod.stage, &["delete", "second"]);
    pod.end();
}
