//! buildah and podman's builds, with kiln as the runtime of their steps.

use std::fs;

use crate::stage::{Stage, on_stage};

/// How buildah is told to run steps by kiln.
const BY_KILN: [&str; 4] = ["--isolation", "oci", "--runtime", "/usr/local/bin/kiln"];

const CONTAINERFILE: &str = r#"
FROM localhost/kiln-test AS build
COPY source /work/source
WORKDIR /work
RUN --mount=type=cache,target=/cache echo built >> /cache/log && cp /cache/log log
RUN --mount=type=secret,id=token cp /run/secrets/token token && tr a-z A-Z < source > result
RUN chown builder:extra result && chmod 4750 result && ln result hard && ln -s result soft && rm source
USER builder
RUN id -u > /tmp/user; test ! -e /run/secrets/token

FROM localhost/kiln-test
COPY --from=build /work /work
COPY --from=build /tmp/user /work/user
ENV GREETING=hello
RUN echo "$GREETING" > /work/greeting
CMD ["cat", "/work/greeting"]
"#;

/// A folder to build, with the words of the secret beside it.
fn context(stage: &Stage) -> (String, String) {
    let context = stage.path("context");
    fs::create_dir(&context).expect("directory");
    fs::write(context.join("Containerfile"), CONTAINERFILE).expect("file");
    fs::write(context.join("source"), "text\n").expect("file");
    let secret = stage.path("token");
    fs::write(&secret, "s3cret\n").expect("file");
    (context.display().to_string(), format!("id=token,src={}", secret.display()))
}

/// Checks the files of an image that was built.
fn check(stage: &Stage, image: &str) {
    let container = stage.ok(&["buildah", "from", image]);
    let rootfs = stage.ok(&["buildah", "mount", container.trim()]);
    let work = std::path::Path::new(rootfs.trim()).join("work");
    let read = |name: &str| fs::read_to_string(work.join(name)).expect(name);
    assert_eq!(read("result"), "TEXT\n");
    assert_eq!(read("token"), "s3cret\n");
    assert_eq!(read("log"), "built\n");
    assert_eq!(read("user"), "1000\n");
    assert_eq!(read("greeting"), "hello\n");
    assert!(!work.join("source").exists());
    let of_result = work.join("result").display().to_string();
    assert_eq!(stage.ok(&["stat", "-c", "%u:%g %a", &of_result]), "1000:2000 4750\n");
    assert_eq!(fs::read_link(work.join("soft")).expect("link").to_str(), Some("result"));
}

#[test]
fn multi_stage_build_with_cache_and_secret() {
    on_stage(|stage| {
        stage.for_podman();
        let (context, secret) = context(stage);
        let options = ["--network", "none", "--secret", &secret, "--tag", "built", &context];
        stage.ok(&[&["buildah", "build"], &BY_KILN[..], &options].concat());
        check(stage, "localhost/built");
        assert_eq!(stage.containers(), 0);
    });
}

#[test]
fn podmans_build() {
    on_stage(|stage| {
        stage.for_podman();
        let (context, secret) = context(stage);
        let podman = ["podman", "--runtime", "/usr/local/bin/kiln", "build", "--isolation", "oci"];
        let options = ["--network", "none", "--secret", &secret, "--tag", "built", &context];
        stage.ok(&[&podman[..], &options].concat());
        check(stage, "localhost/built");
    });
}

#[test]
fn failing_step_fails_the_build_with_its_status() {
    on_stage(|stage| {
        stage.for_podman();
        let context = stage.path("context");
        fs::create_dir(&context).expect("directory");
        let file = "FROM localhost/kiln-test\nRUN echo what went wrong >&2; exit 42\n";
        fs::write(context.join("Containerfile"), file).expect("file");
        let options = ["--network", "none", &context.display().to_string()];
        let output = stage.run(&[&["buildah", "build"], &BY_KILN[..], &options].concat());
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(errors.contains("what went wrong") && errors.contains("42"), "{errors}");
        assert!(!output.status.success());
    });
}

#[test]
fn commands_are_run_in_working_containers() {
    on_stage(|stage| {
        stage.for_podman();
        let container = stage.ok(&["buildah", "from", "localhost/kiln-test"]);
        let container = container.trim();
        let run = [&["buildah", "run"], &BY_KILN[..], &["--network", "none"]].concat();
        let script = ["--user", "builder", container, "--", "sh", "-c", "id -un; echo x > /tmp/x"];
        assert_eq!(stage.ok(&[&run[..], &script].concat()), "builder\n");
        let status = [&run[..], &[container, "--", "sh", "-c", "cat /tmp/x; exit 3"]].concat();
        let output = stage.run(&status);
        assert_eq!(String::from_utf8_lossy(&output.stdout), "x\n");
        assert_eq!(output.status.code(), Some(3));
    });
}

#[test]
fn steps_have_the_network_of_the_build() {
    on_stage(|stage| {
        stage.for_podman();
        let context = stage.path("context");
        fs::create_dir(&context).expect("directory");
        let file = "FROM localhost/kiln-test\nRUN ip -o -4 address show eth0; ip route\n";
        fs::write(context.join("Containerfile"), file).expect("file");
        let context = context.display().to_string();
        let said = stage.ok(&[&["buildah", "build"], &BY_KILN[..], &[&context]].concat());
        assert!(said.contains("10.88.0.") && said.contains("default via 10.88.0.1"), "{said}");
    });
}
