//! podman, with kiln as its runtime.

use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::image::NAME;
use crate::stage::{Stage, eventually, on_stage};

/// `podman run` without a network, with further options and a command.
fn run<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    [&["podman", "run", "--rm", "--network", "none"], options, &[NAME], command].concat()
}

/// `podman run --detach` of a container named `c` that runs a script.
fn detach(stage: &Stage, options: &[&str], script: &str) {
    let first = ["podman", "run", "--detach", "--name", "c", "--network", "none"];
    stage.ok(&[&first, options, &[NAME, "sh", "-c", script]].concat());
}

fn podman(stage: &Stage, args: &[&str]) -> String {
    stage.ok(&[&["podman"], args].concat())
}

fn inspect(stage: &Stage, field: &str) -> String {
    podman(stage, &["inspect", "--format", &format!("{{{{{field}}}}}"), "c"]).trim().to_owned()
}

#[test]
fn steps_give_their_output_and_their_status() {
    on_stage(|stage| {
        stage.for_podman();
        let script = "echo out; echo err >&2; exit 7";
        let output = stage.run(&run(&[], &["dash", "-c", script]));
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");
        assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
        let errors = stage.fails(127, &run(&[], &["no-such-program"]));
        assert!(errors.contains("no-such-program"), "{errors}");
    });
}

#[test]
fn steps_have_the_user_the_limits_and_the_files_that_they_are_given() {
    on_stage(|stage| {
        stage.for_podman();
        let script = "id -u; id -g; id -G; grep CapEff: /proc/self/status; hostname; pwd; echo $GREETING; \
                      ulimit -n; ulimit -Hn; cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/pids.max; \
                      touch /written 2>/dev/null || echo read-only; \
                      touch /scratch/written && echo scratch";
        let options = [
            "--user",
            "builder",
            "--cap-drop",
            "all",
            "--hostname",
            "step",
            "--workdir",
            "/tmp",
            "--env",
            "GREETING=hello",
            "--ulimit",
            "nofile=100:200",
            "--memory",
            "300m",
            "--pids-limit",
            "50",
            "--read-only",
            "--tmpfs",
            "/scratch",
        ];
        let output = stage.ok(&run(&options, &["sh", "-c", script]));
        let lines: Vec<_> = output.lines().collect();
        let expected = [
            "1000",
            "1000",
            "1000 2000",
            "CapEff:\t0000000000000000",
            "step",
            "/tmp",
            "hello",
            "100",
            "200",
            "314572800",
            "50",
            "read-only",
            "scratch",
        ];
        assert_eq!(lines, expected);
    });
}

#[test]
fn privileged_steps_are_root_of_their_guest_and_have_its_devices() {
    on_stage(|stage| {
        stage.for_podman();
        let script = "mount -t tmpfs none /tmp && echo mounted; \
                      : < /dev/net/tun && echo tun; ls /dev/kvm || echo no kvm";
        let printed = stage.ok(&run(&["--privileged"], &["sh", "-c", script]));
        assert_eq!(printed, "mounted\ntun\nno kvm\n");
    });
}

#[test]
fn volumes_are_shared_with_the_host_and_between_steps() {
    on_stage(|stage| {
        stage.for_podman();
        let directory = stage.path("shared");
        fs::create_dir(&directory).expect("directory");
        fs::write(directory.join("in"), "from the host\n").expect("file");
        let both = format!("{}:/both", directory.display());
        let read_only = format!("{}:/read-only:ro", directory.display());
        let script = "cat /both/in; echo from the step > /both/out; chown 1000:1000 /both/out; \
                      touch /read-only/x || echo refused; echo kept > /named/file";
        let options = ["--volume", &both, "--volume", &read_only, "--volume", "named:/named"];
        let output = stage.ok(&run(&options, &["sh", "-c", script]));
        assert_eq!(output, "from the host\nrefused\n");
        let written = directory.join("out");
        assert_eq!(fs::read_to_string(&written).expect("written"), "from the step\n");
        assert_eq!(fs::metadata(written).expect("metadata").uid(), 1000);
        let output = stage.ok(&run(&["--volume", "named:/named"], &["cat", "/named/file"]));
        assert_eq!(output, "kept\n");

        // Directories that the host lays over each other.
        let over = format!("{}:/over:O", directory.display());
        let image = format!("type=image,source={NAME},destination=/image");
        let script = "echo mine > /over/in; cat /over/in; test -x /image/bin/busybox && echo there";
        let options = ["--volume", &over, "--mount", &image];
        assert_eq!(stage.ok(&run(&options, &["sh", "-c", script])), "mine\nthere\n");
        assert_eq!(fs::read_to_string(directory.join("in")).expect("file"), "from the host\n");
    });
}

#[test]
fn input_is_given_to_its_end_and_terminals_are_terminals() {
    on_stage(|stage| {
        stage.for_podman();
        let piped = format!("printf 'a\\nb\\n' | {} -i {NAME} wc -l", RUN.join(" "));
        assert_eq!(stage.ok(&["sh", "-c", &piped]).trim(), "2");
        let command = format!("{} -it {NAME} sh -c 'tty && stty size && exit 5'", RUN.join(" "));
        let sized = format!("stty rows 31 cols 97; {command}");
        let output = stage.run(&["script", "-q", "-e", "-c", &sized, "/dev/null"]);
        assert_eq!(output.status.code(), Some(5));
        let screen = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(screen.contains("/dev/pts/0") && screen.contains("31 97"), "{screen:?}");
    });
}

const RUN: [&str; 5] = ["podman", "run", "--rm", "--network", "none"];

#[test]
fn containers_in_the_background_are_stopped_and_keep_their_logs() {
    on_stage(|stage| {
        stage.for_podman();
        let script = "trap 'echo stopping; exit 3' TERM; echo started; while :; do sleep 0.1; done";
        detach(stage, &[], script);
        eventually("the first line", || podman(stage, &["logs", "c"]).contains("started"));
        assert_eq!(inspect(stage, ".State.Status"), "running");
        assert!(podman(stage, &["ps"]).contains(NAME));
        podman(stage, &["stop", "c"]);
        assert_eq!(podman(stage, &["wait", "c"]).trim(), "3");
        assert_eq!(podman(stage, &["logs", "c"]), "started\nstopping\n");
        assert_eq!(inspect(stage, ".State.ExitCode"), "3");

        podman(stage, &["start", "c"]);
        podman(stage, &["kill", "c"]);
        assert_eq!(podman(stage, &["wait", "c"]).trim(), "137");
        podman(stage, &["rm", "c"]);
        assert_eq!(podman(stage, &["ps", "--all", "--quiet"]), "");
        assert_eq!(stage.containers(), 0, "kiln has forgotten them");

        detach(stage, &[], "sleep 1000");
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
        assert_eq!(stage.containers(), 0);
    });
}

#[test]
fn commands_are_executed_in_running_containers() {
    on_stage(|stage| {
        stage.for_podman();
        detach(stage, &["--volume", "named:/named"], "exec sleep 1000");
        let output = stage.run(&["podman", "exec", "c", "sh", "-c", "ps; echo err >&2; exit 9"]);
        assert_eq!(output.status.code(), Some(9));
        assert!(String::from_utf8_lossy(&output.stdout).contains("sleep 1000"));
        assert!(String::from_utf8_lossy(&output.stderr).contains("err\n"));
        let options = ["exec", "--user", "1000:2000", "--workdir", "/tmp", "--env", "A=b", "c"];
        let script = ["sh", "-c", "id -u; id -g; pwd; echo $A"];
        assert_eq!(podman(stage, &[&options[..], &script].concat()), "1000\n2000\n/tmp\nb\n");
        let piped = "printf 'a\\nb\\n' | podman exec -i c wc -l";
        assert_eq!(stage.ok(&["sh", "-c", piped]).trim(), "2");
        let terminal = "podman exec -it c sh -c 'tty; exit 6'";
        let output = stage.run(&["script", "-q", "-e", "-c", terminal, "/dev/null"]);
        assert_eq!(output.status.code(), Some(6));
        assert!(String::from_utf8_lossy(&output.stdout).contains("/dev/pts/"));
        let errors = stage.fails(127, &["podman", "exec", "c", "no-such-program"]);
        assert!(errors.contains("no-such-program"), "{errors}");
        podman(stage, &["exec", "--detach", "c", "touch", "/named/detached"]);
        let written = || stage.run(&["podman", "exec", "c", "test", "-e", "/named/detached"]);
        eventually("what a detached exec does", || written().status.success());
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
        stage.fails(125, &["podman", "exec", "c", "true"]);
    });
}

#[test]
fn containers_are_checked_and_measured() {
    on_stage(|stage| {
        stage.for_podman();
        let health = ["--health-cmd", "test -e /tmp/healthy", "--health-interval", "disable"];
        detach(stage, &health, "exec sleep 1000");
        stage.fails(1, &["podman", "healthcheck", "run", "c"]);
        podman(stage, &["exec", "c", "touch", "/tmp/healthy"]);
        podman(stage, &["healthcheck", "run", "c"]);
        let format = ["--format", "{{.PIDs}} of {{.MemUsage}}"];
        let stats = podman(stage, &[&["stats", "--no-stream"], &format[..], &["c"]].concat());
        assert!(stats.contains("MB / "), "{stats}");
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
    });
}

#[test]
fn bridged_containers_reach_the_host_and_are_reached_by_published_ports() {
    on_stage(|stage| {
        stage.for_podman();
        let server = "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www";
        let options = ["run", "--detach", "--name", "c", "--publish", "8080:80", NAME];
        podman(stage, &[&options[..], &["sh", "-c", server]].concat());
        let address = inspect(stage, ".NetworkSettings.IPAddress");
        let get = |url: &str| stage.run(&["/bin/busybox", "wget", "-q", "-O", "-", url]);
        let served = |url: &str| get(url).stdout == b"served\n";
        eventually("an answer", || served(&format!("http://{address}/")));
        assert!(served("http://127.0.0.1:8080/"));

        let command = ["run", "--rm", NAME, "sh", "-c", "ip -o -4 address show eth0; ip route"];
        let configured = podman(stage, &command);
        assert!(configured.contains("10.88.0."), "{configured}");
        assert!(configured.contains("default via 10.88.0.1"), "{configured}");
        let url = format!("http://{address}/");
        let fetched = podman(stage, &["run", "--rm", NAME, "wget", "-q", "-O", "-", &url]);
        assert_eq!(fetched, "served\n", "containers reach each other");
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
    });
}

#[test]
fn files_are_copied_into_and_out_of_running_containers() {
    on_stage(|stage| {
        stage.for_podman();
        detach(stage, &[], "echo theirs > /tmp/theirs; exec sleep 1000");
        let (to, from) = (stage.path("mine"), stage.path("theirs"));
        fs::write(&to, "mine\n").expect("file");
        podman(stage, &["cp", &to.display().to_string(), "c:/tmp/mine"]);
        assert_eq!(podman(stage, &["exec", "c", "cat", "/tmp/mine"]), "mine\n");
        podman(stage, &["cp", "c:/tmp/theirs", &from.display().to_string()]);
        assert_eq!(fs::read_to_string(from).expect("copied"), "theirs\n");
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
    });
}

#[test]
fn containers_are_paused_and_go_on() {
    on_stage(|stage| {
        stage.for_podman();
        detach(stage, &[], "while :; do echo tick; sleep 0.1; done");
        eventually("the first line", || podman(stage, &["logs", "c"]).contains("tick"));
        podman(stage, &["pause", "c"]);
        assert_eq!(inspect(stage, ".State.Status"), "paused");
        // What had been written before may take a moment to arrive.
        let mut before = String::new();
        eventually("that nothing is written", || {
            let now = podman(stage, &["logs", "c"]);
            std::mem::replace(&mut before, now.clone()) == now
        });
        podman(stage, &["unpause", "c"]);
        eventually("that it goes on", || podman(stage, &["logs", "c"]) != before);
        podman(stage, &["rm", "--force", "--time", "0", "c"]);
    });
}
