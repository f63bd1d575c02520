//! `kiln debug`: what is known of a container that runs, has stopped or is broken, without secrets.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::Path;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::lifecycle::{kiln, succeeds, wait_for};
use crate::stage::{Stage, errors};

/// The parts of an archive by their names below its folder.
fn parts(archive: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(archive);
    let mut parts = BTreeMap::new();
    for entry in archive.entries().expect("entries") {
        let mut entry = entry.expect("entry");
        let path = entry.path().expect("path").into_owned();
        let name = path.strip_prefix("kiln-debug-test").expect("the folder").display().to_string();
        let mut text = String::new();
        entry.read_to_string(&mut text).expect("text");
        parts.insert(name, text);
    }
    parts
}

/// `kiln debug` with the archive on standard output.
fn debug(stage: &Stage, log: &Path) -> (Vec<u8>, BTreeMap<String, String>) {
    let mut command = stage.kiln();
    let output = command.arg("--log").arg(log).args(["debug", "--output", "-", "test"]).output();
    let output = output.expect("kiln");
    assert!(output.status.success(), "{}", errors(&output));
    let parts = parts(&output.stdout);
    (output.stdout, parts)
}

#[test]
fn archive_has_what_is_known_but_no_secrets() {
    const SECRET: &str = "hunter2-and-more";

    let stage = Stage::new(&["sh", "-c", "sleep 1000", "--password", SECRET]);
    stage.edit(|config| {
        config["process"]["env"] = json!(["PATH=/bin", format!("DATABASE={SECRET}")]);
        config["annotations"] = json!({"com.example.token": SECRET, "io.kiln.cpus": "1"});
        let env = [format!("HOOK={SECRET}")];
        config["hooks"] = json!({"poststop": [{"path": "/bin/true", "env": env}]});
    });
    let settings = stage.path().join("kiln.toml");
    fs::write(&settings, "kernel_args = \"loglevel=7\"\n").expect("written");
    let log = stage.path().join("log.json");
    fs::write(&log, format!("{{\"level\":\"info\",\"msg\":\"it is {SECRET}\"}}\n")).expect("log");
    let file = |name| fs::File::create(stage.path().join(name)).expect("file");
    let mut create = stage.kiln();
    create.arg("--config").arg(&settings).arg("--log").arg(&log).args(["--log-format", "json"]);
    create.args(["create", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    create.stdin(Stdio::null()).stdout(file("output")).stderr(file("errors"));
    assert!(create.status().expect("kiln").success());
    succeeds(&stage, &["start", "test"]);

    let lacks_secrets = |archive: &[u8]| {
        assert!(!archive.windows(SECRET.len()).any(|part| part == SECRET.as_bytes()));
    };
    let (archive, running) = debug(&stage, &log);
    lacks_secrets(&archive);
    assert!(!running["MANIFEST"].contains("txt: missing"), "{}", running["MANIFEST"]);
    assert!(!running["MANIFEST"].contains("json: missing"), "{}", running["MANIFEST"]);
    let config: Value = serde_json::from_str(&running["config.json"]).expect("JSON");
    assert_eq!(config["process"]["env"], json!(["PATH=/bin", "DATABASE=***"]));
    assert_eq!(config["annotations"]["io.kiln.cpus"], "1");
    let state: Value = serde_json::from_str(&running["state.json"]).expect("JSON");
    assert_eq!(state["hooks"]["poststop"][0]["env"], json!(["HOOK=***"]));
    assert!(running["console.txt"].contains("/init"), "{}", running["console.txt"]);
    assert!(running["log.txt"].contains("it is ***"), "{}", running["log.txt"]);
    assert!(running["log.txt"].contains("\"phase\":\"boot\""), "{}", running["log.txt"]);
    assert!(running["metrics.txt"].contains("kiln_container_up{id=\"test\""));
    assert!(running["inspection.json"].contains("\"phase\": \"step\""));
    assert!(running["versions.txt"].starts_with("kiln version "));
    assert!(running["doctor.txt"].contains("guest kernel"), "{}", running["doctor.txt"]);
    assert!(running["host/version"].starts_with("Linux version "));
    for role in ["monitor", "fs", "devices", "qemu"] {
        let status = running.iter().find(|(name, _)| {
            name.starts_with(&format!("processes/{role}-")) && name.ends_with("/status")
        });
        assert!(status.is_some_and(|(_, status)| status.starts_with("Name:")), "{role}");
    }

    // A file, which is never somebody else's.
    let path = stage.path().join("archive.tar");
    let to_file = |path: &Path| -> Output {
        let path = path.to_str().expect("text");
        kiln(&stage, &["debug", "--output", path, "test"])
    };
    let output = to_file(&path);
    assert_eq!(String::from_utf8_lossy(&output.stdout), format!("{}\n", path.display()));
    let archive = fs::read(&path).expect("archive");
    assert!(parts(&archive)["MANIFEST"].contains("log.txt: missing: name the sandbox's log file"));
    let output = to_file(&path);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("archive.tar exists: remove it"), "{}", errors(&output));
    assert!(fs::read(&path).expect("archive") == archive);

    succeeds(&stage, &["kill", "test", "KILL"]);
    wait_for(&stage, "stopped");
    let (archive, stopped) = debug(&stage, &log);
    lacks_secrets(&archive);
    assert!(stopped["MANIFEST"].contains("processes: missing: the container has stopped"));
    assert!(!stopped["console.txt"].is_empty());
    assert!(stopped["inspection.json"].contains("\"teardown\""), "{}", stopped["inspection.json"]);

    // A bundle that is gone, and then a state that can't be read. What is a secret is not known then.
    fs::remove_file(stage.bundle().join("config.json")).expect("removed");
    let (archive, parts) = debug(&stage, &log);
    lacks_secrets(&archive);
    for part in ["config.json", "log.txt", "console.txt"] {
        assert!(parts["MANIFEST"].contains(&format!("{part}: missing: ")), "{part}");
    }
    assert!(parts.contains_key("state.json") && parts.contains_key("metrics.txt"));
    let state = stage.root().join("test/state.json");
    let whole = fs::read(&state).expect("state");
    fs::write(&state, format!("{{\"annotations\": {{\"x\": \"{SECRET}\"")).expect("written");
    let (archive, broken) = debug(&stage, &log);
    lacks_secrets(&archive);
    for part in ["config.json", "state.json", "log.txt", "console.txt", "metrics.txt", "processes"]
    {
        assert!(broken["MANIFEST"].contains(&format!("{part}: missing: ")), "{part}");
    }
    assert!(broken.contains_key("doctor.txt") && broken.contains_key("host/version"));
    fs::write(&state, whole).expect("written");
    succeeds(&stage, &["delete", "test"]);

    let path = stage.path().join("nobody.tar");
    let output = to_file(&path);
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("does not exist"), "{}", errors(&output));
    assert!(!path.exists());
}
