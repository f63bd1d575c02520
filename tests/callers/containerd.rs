//! containerd with its own shim for runc, which calls kiln instead.

use crate::image::{Image, NAME};
use crate::stage::{Daemon, Stage, eventually, on_stage, write};

const ADDRESS: &str = "/run/containerd.sock";

/// A containerd of the stage's own, with the image.
fn containerd(stage: &Stage) -> Daemon {
    let config = format!(
        "version = 2\nroot = \"{}\"\nstate = \"/run/containerd\"\n\
         disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{ADDRESS}\"\n",
        stage.path("containerd").display()
    );
    write("/etc/containerd/config.toml", &config);
    let daemon = stage.start(&["containerd", "--config", "/etc/containerd/config.toml"]);
    eventually("an answer of containerd", || {
        stage.run(&["ctr", "--address", ADDRESS, "version"]).status.success()
    });
    ctr(stage, &["images", "import", &Image::new(stage).archive()]);
    daemon
}

fn command<'a>(args: &[&'a str]) -> Vec<&'a str> {
    [&["ctr", "--address", ADDRESS], args].concat()
}

fn ctr(stage: &Stage, args: &[&str]) -> String {
    stage.ok(&command(args))
}

/// `ctr run` with kiln.
fn run<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let by_kiln = ["run", "--runc-binary", "/usr/local/bin/kiln"];
    self::command(&[&by_kiln[..], options, &[NAME], command].concat())
}

#[test]
fn tasks_are_run_in_the_foreground() {
    on_stage(|stage| {
        let _containerd = containerd(stage);
        let output =
            stage.run(&run(&["--rm"], &["c", "sh", "-c", "echo out; echo err >&2; exit 7"]));
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
        assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
        let errors = stage.fails(1, &run(&["--rm"], &["c", "no-such-program"]));
        assert!(errors.contains("no-such-program"), "{errors}");
        let options = ["--rm", "--env", "A=b", "--cwd", "/tmp", "--read-only"];
        let script = "echo $A; pwd; touch /x || echo refused";
        let output = stage.ok(&run(&options, &["c", "sh", "-c", script]));
        assert_eq!(output, "b\n/tmp\nrefused\n");
        assert_eq!(ctr(stage, &["containers", "list", "--quiet"]), "");
    });
}

#[test]
fn tasks_on_a_terminal_have_one() {
    on_stage(|stage| {
        let _containerd = containerd(stage);
        // The size is set once the task runs.
        let script = "'tty; until stty size | grep 97; do sleep 0.1; done; exit 5'";
        let command = run(&["--rm", "--tty"], &["c", "sh", "-c", script]).join(" ");
        let sized = format!("stty rows 31 cols 97; {command}");
        let output = stage.run(&["script", "-q", "-e", "-c", &sized, "/dev/null"]);
        assert_eq!(output.status.code(), Some(5));
        let screen = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(screen.contains("/dev/pts/0") && screen.contains("31 97"), "{screen:?}");
    });
}

#[test]
fn tasks_in_the_background_are_entered_measured_and_killed() {
    on_stage(|stage| {
        let _containerd = containerd(stage);
        stage.ok(&run(&["--detach"], &["c", "sleep", "1000"]));
        let listed = || ctr(stage, &["tasks", "list"]);
        assert!(listed().contains("RUNNING"), "{}", listed());
        let exec = ["tasks", "exec", "--exec-id", "e", "c", "sh", "-c", "echo in; exit 9"];
        let output = stage.run(&command(&exec));
        assert_eq!(output.status.code(), Some(9));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "in\n");
        // Of whichever version the machine's cgroups are.
        let metrics = ctr(stage, &["tasks", "metrics", "c"]);
        assert!(metrics.contains("memory.usage"), "{metrics}");
        ctr(stage, &["tasks", "kill", "--signal", "KILL", "c"]);
        eventually("the end of the task", || listed().contains("STOPPED"));
        ctr(stage, &["tasks", "rm", "c"]);
        ctr(stage, &["containers", "rm", "c"]);
    });
}

#[test]
fn tasks_are_paused_and_listed() {
    on_stage(|stage| {
        let _containerd = containerd(stage);
        stage.ok(&run(&["--detach"], &["c", "sleep", "1000"]));
        let listed = || ctr(stage, &["tasks", "list"]);
        ctr(stage, &["tasks", "pause", "c"]);
        assert!(listed().contains("PAUSED"), "{}", listed());
        ctr(stage, &["tasks", "resume", "c"]);
        let pids = ctr(stage, &["tasks", "ps", "c"]);
        assert!(pids.lines().count() >= 2, "{pids}");
        ctr(stage, &["tasks", "kill", "--signal", "KILL", "c"]);
        eventually("the end of the task", || listed().contains("STOPPED"));
    });
}
