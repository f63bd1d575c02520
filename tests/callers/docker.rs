//! Docker Engine with kiln as a runtime, and the BuildKit in it with kiln in the place of its runc.

use std::fs;

use crate::image::{Image, NAME};
use crate::stage::{Daemon, Stage, eventually, install, on_stage};

/// The distribution's own command: machines may have another one earlier in the search path.
const DOCKER: &str = "/usr/bin/docker";

/// A Docker Engine of the stage's own, with the image.
fn dockerd(stage: &Stage) -> Daemon {
    install("/etc/docker/daemon.json");
    let data = stage.path("docker").display().to_string();
    // Where BuildKit looks for runc.
    std::os::unix::fs::symlink("kiln", "/usr/local/bin/runc").expect("link");
    let daemon = stage.start(&["dockerd", "--data-root", &data, "--exec-root", "/run/docker"]);
    eventually("an answer of dockerd", || stage.run(&[DOCKER, "version"]).status.success());
    docker(stage, &["import", &Image::new(stage).layer(), NAME]);
    daemon
}

fn docker(stage: &Stage, args: &[&str]) -> String {
    stage.ok(&[&[DOCKER], args].concat())
}

/// `docker run` by kiln without a network.
fn run<'a>(options: &[&'a str], command: &[&'a str]) -> Vec<&'a str> {
    let by_kiln = [DOCKER, "run", "--runtime", "kiln", "--network", "none"];
    [&by_kiln[..], options, &[NAME], command].concat()
}

#[test]
fn containers_run_and_are_entered() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        let output = stage.run(&run(&["--rm"], &["sh", "-c", "echo out; exit 7"]));
        assert_eq!(output.status.code(), Some(7));
        assert_eq!(String::from_utf8_lossy(&output.stdout), "out\n");

        stage.ok(&run(&["--detach", "--name", "step"], &["sleep", "1000"]));
        let exec = stage.run(&[DOCKER, "exec", "step", "sh", "-c", "echo in; exit 9"]);
        assert_eq!(exec.status.code(), Some(9));
        assert_eq!(String::from_utf8_lossy(&exec.stdout), "in\n");
        assert!(docker(stage, &["stats", "--no-stream", "step"]).contains("MiB / "));
        docker(stage, &["rm", "--force", "step"]);
    });
}

#[test]
fn privileged_containers_are_root_of_their_guest_and_have_its_devices() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        let script = "mount -t tmpfs none /tmp && echo mounted; : < /dev/net/tun && echo tun; \
                      ls /dev/kvm || echo no kvm";
        let printed = stage.ok(&run(&["--rm", "--privileged"], &["sh", "-c", script]));
        assert_eq!(printed, "mounted\ntun\nno kvm\n");
    });
}

const DOCKERFILE: &str = r#"FROM localhost/kiln-test:latest AS build
COPY source /work/source
WORKDIR /work
RUN --mount=type=cache,target=/cache echo built >> /cache/log && cp /cache/log log
RUN --mount=type=secret,id=token cp /run/secrets/token token && tr a-z A-Z < source > result
USER builder
RUN id -u > /tmp/user

FROM scratch
COPY --from=build /work /tmp/user /
"#;

#[test]
fn buildkit_builds_with_cache_and_secret() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        let (context, secret) = (stage.path("context"), stage.path("token"));
        fs::create_dir(&context).expect("directory");
        fs::write(context.join("Dockerfile"), DOCKERFILE).expect("file");
        fs::write(context.join("source"), "text\n").expect("file");
        fs::write(&secret, "s3cret\n").expect("file");
        let out = stage.path("out");
        let secret = format!("id=token,src={}", secret.display());
        let output = format!("type=local,dest={}", out.display());
        let build = ["env", "DOCKER_BUILDKIT=1", DOCKER, "build", "--progress", "plain"];
        let context = context.display().to_string();
        let options = ["--network", "none", "--secret", &secret, "--output", &output, &context];
        stage.ok(&[&build[..], &options].concat());
        let read = |name: &str| fs::read_to_string(out.join(name)).expect(name);
        assert_eq!(read("result"), "TEXT\n");
        assert_eq!(read("token"), "s3cret\n");
        assert_eq!(read("log"), "built\n");
        assert_eq!(read("user"), "1000\n");
    });
}

#[test]
fn buildkits_failing_step_fails_the_build_and_a_cancelled_one_is_killed() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        let context = stage.path("context");
        fs::create_dir(&context).expect("directory");
        let folder = context.display().to_string();
        let build = ["env", "DOCKER_BUILDKIT=1", DOCKER, "build", "--progress", "plain"];
        let build = [&build[..], &["--network", "none", &folder]].concat();
        let write = |step: &str| {
            let file = format!("FROM {NAME}\nRUN {step}\n");
            fs::write(context.join("Dockerfile"), file).expect("file");
        };
        write("echo what went wrong >&2; exit 42");
        let errors = stage.fails(1, &build);
        assert!(errors.contains("what went wrong") && errors.contains("exit code: 42"), "{errors}");
        assert_eq!(stage.containers(), 0);

        write("sleep 1000");
        let running = stage.start(&build);
        eventually("the step", || stage.containers() == 1);
        drop(running);
        eventually("the step's end", || stage.containers() == 0);
        write("true");
        stage.ok(&build);
    });
}

#[test]
fn bridged_containers_are_reached_by_published_ports() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        let server = "mkdir /www; echo served > /www/index.html; exec httpd -f -p 80 -h /www";
        let options = ["run", "--detach", "--runtime", "kiln", "--publish", "8080:80", NAME];
        docker(stage, &[&options[..], &["sh", "-c", server]].concat());
        let get = ["/bin/busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:8080/"];
        eventually("an answer", || stage.run(&get).stdout == b"served\n");
    });
}

#[test]
fn containers_are_paused_listed_and_updated() {
    on_stage(|stage| {
        let _dockerd = dockerd(stage);
        stage.ok(&run(&["--detach", "--name", "step"], &["sleep", "1000"]));
        docker(stage, &["pause", "step"]);
        assert!(docker(stage, &["ps"]).contains("(Paused)"));
        docker(stage, &["unpause", "step"]);
        assert!(docker(stage, &["top", "step"]).contains("PID"));
        docker(stage, &["update", "--pids-limit", "64", "step"]);
        let limit = ["exec", "step", "cat", "/sys/fs/cgroup/pids.max"];
        assert_eq!(docker(stage, &limit), "64\n");
        docker(stage, &["rm", "--force", "step"]);
    });
}
