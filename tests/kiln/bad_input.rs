//! Bad input gets a clear error, exit code 1, and leaves nothing behind.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;

use serde_json::json;

use crate::stage::{Stage, errors};

/// A folder with a kernel and an agent that pass for such until a guest is started.
fn dummy_artefacts(stage: &Stage) -> std::path::PathBuf {
    let lib = stage.path().join("lib");
    fs::create_dir(&lib).expect("made");
    for name in ["vmlinux", "kiln-agent"] {
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_kiln"), lib.join(name)).expect("linked");
    }
    lib
}

/// Runs the bundle and checks that it is refused with every one of the given words.
fn refused(stage: &Stage, options: &[&str], words: &[&str]) {
    let output = stage.run(options).output().expect("kiln runs");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert!(stage.is_clean(), "something is left behind");
}

#[test]
fn missing_configuration() {
    let stage = Stage::new(&["true"]);
    fs::remove_file(stage.bundle().join("config.json")).expect("removed");
    refused(&stage, &[], &["config.json", "not found", "kiln spec"]);
}

#[test]
fn malformed_configuration_with_line_and_column() {
    let stage = Stage::new(&["true"]);
    stage.write_config_text("{\n \"ociVersion\": \"1.0.2\",\n \"process\": }\n");
    refused(&stage, &[], &["config.json", "line 3 column 13"]);
}

#[test]
fn unknown_field_by_name() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| config["linux"]["resources"] = json!({"memory": {"limits": 1}}));
    refused(&stage, &[], &["linux.resources.memory.limits"]);
}

#[test]
fn hooks_and_host_namespaces_by_name() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| config["hooks"] = json!({"prestart": [{"path": "bin/true"}]}));
    refused(&stage, &[], &["hooks.prestart[0].path"]);
    stage.edit(|config| {
        config["hooks"] = json!(null);
        config["linux"]["namespaces"][0]["path"] = json!("/proc/self/ns/net");
    });
    refused(&stage, &[], &["linux.namespaces[0].path", "another type"]);
}

#[test]
fn absent_root_file_system() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| config["root"]["path"] = json!("nowhere"));
    refused(&stage, &[], &["root.path", "nowhere"]);
}

#[test]
fn absent_bind_source() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| {
        config["mounts"] = json!([{"destination": "/x", "type": "bind", "source": "/no/such"}]);
    });
    refused(&stage, &[], &["mounts[0].source", "/no/such"]);
}

#[test]
fn invalid_ids() {
    let stage = Stage::new(&["true"]);
    for id in ["../escape", "a b", ".."] {
        let output = stage
            .kiln()
            .args(["run", "--bundle"])
            .arg(stage.bundle())
            .arg(id)
            .output()
            .expect("runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains("invalid container id"), "{}", errors(&output));
    }
    assert!(stage.is_clean());
}

#[test]
fn sizes_out_of_range() {
    let stage = Stage::new(&["true"]);
    refused(&stage, &["--memory", "16"], &["16 MiB", "at least"]);
    refused(&stage, &["--memory", "99999999"], &["this host has"]);
    refused(&stage, &["--cpus", "0"], &["0 CPUs", "use 1 to"]);
    stage.edit(|config| config["annotations"] = json!({"io.kiln.cpus": "many"}));
    refused(&stage, &[], &["io.kiln.cpus", "many"]);
}

#[test]
fn annotation_that_is_misspelt() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| config["annotations"] = json!({"io.kiln.dedline": "30m"}));
    refused(&stage, &[], &["annotations[\"io.kiln.dedline\"]", "use io.kiln.deadline"]);
}

#[test]
fn unknown_setting_by_name_and_line() {
    let stage = Stage::new(&["true"]);
    let path = stage.path().join("kiln.toml");
    fs::write(&path, "engine = \"emulated\"\nmemory = 5\n").expect("written");
    let mut command = stage.kiln();
    command.arg("--config").arg(path).args(["run", "--bundle"]).arg(stage.bundle()).arg("test");
    let output = command.output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("memory") && errors.contains("line 2"), "{errors}");
}

#[test]
fn missing_and_broken_artefacts() {
    let stage = Stage::new(&["true"]);
    let lib = stage.path().join("lib");
    fs::create_dir(&lib).expect("made");
    let run = |words: &[&str]| {
        let mut command = stage.run(&[]);
        command.env("KILN_LIB_DIR", &lib);
        let output = command.output().expect("runs");
        assert_eq!(output.status.code(), Some(1));
        for word in words {
            assert!(errors(&output).contains(word), "{word:?}: {}", errors(&output));
        }
        assert!(stage.is_clean());
    };
    run(&["no guest kernel and agent", "make"]);
    fs::write(lib.join("vmlinux"), "a compressed kernel").expect("written");
    run(&["vmlinux", "not an x86-64 ELF"]);
    fs::copy(env!("CARGO_BIN_EXE_kiln"), lib.join("vmlinux")).expect("copied");
    run(&["guest agent", "kiln-agent"]);
}

#[test]
fn missing_qemu() {
    let stage = Stage::new(&["true"]);
    let lib = dummy_artefacts(&stage);
    let path = stage.path().join("kiln.toml");
    fs::write(&path, "qemu = \"/no/such/qemu\"\n").expect("written");
    let mut command = stage.kiln();
    command.env("KILN_LIB_DIR", &lib).arg("--config").arg(path);
    command.args(["run", "--engine", "emulated", "--bundle"]).arg(stage.bundle()).arg("test");
    let output = command.output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    for word in ["/no/such/qemu", "last phase reached: host set-up", "install qemu-system-x86"] {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert!(stage.is_clean());
}

#[test]
fn no_memory_for_the_guest() {
    let stage = Stage::new(&["true"]);
    let lib = dummy_artefacts(&stage);
    let run = stage.run(&["--memory", "2000"]);
    let mut command = std::process::Command::new("sh");
    // In KiB: enough for QEMU, not for the guest.
    command.args(["-c", "ulimit -v 1500000; exec \"$@\"", "sh"]).arg(run.get_program());
    command.args(run.get_args()).env("KILN_LIB_DIR", lib);
    let output = command.output().expect("kiln runs");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in [
        "QEMU exited with status 1; last phase reached: boot; ",
        "give the guest less (--memory",
        "Cannot allocate memory",
    ] {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert!(stage.is_clean());
}

#[test]
fn no_permission_for_kvm() {
    let stage = Stage::new(&["true"]);
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.args(["vm", "run", "--engine", "kvm", "--kernel", env!("CARGO_BIN_EXE_kiln")]);
    let output = command.uid(65534).gid(65534).output().expect("kiln runs");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in ["kiln: kvm engine", "--engine emulated", "no permission to open /dev/kvm"] {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert!(errors.contains("usermod -aG") || errors.contains("setfacl"), "{errors}");
    assert!(stage.is_clean());
}

#[test]
fn terminal_without_a_terminal() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| config["process"]["terminal"] = json!(true));
    refused(&stage, &[], &["process.terminal", "not a terminal"]);
}

#[test]
fn unsupported_options_by_name() {
    let stage = Stage::new(&["true"]);
    refused(&stage, &["--preserve-fds", "2"], &["--preserve-fds=2", "leave it out"]);
    let without_terminal = "cannot use console socket if kiln will not detach or allocate tty";
    refused(&stage, &["--console-socket", "/x"], &[without_terminal]);
}

#[test]
fn taken_id() {
    let stage = Stage::new(&["true"]);
    fs::create_dir_all(stage.root().join("test")).expect("made");
    let lock = File::create(stage.root().join("test/lock")).expect("made");
    lock.lock().expect("locked");
    let lib = dummy_artefacts(&stage);
    let output = stage.run(&[]).env("KILN_LIB_DIR", lib).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("already exists: test"), "{}", errors(&output));
}

#[test]
fn state_directory_that_can_not_be_made() {
    let stage = Stage::new(&["true"]);
    fs::write(stage.root(), "a file").expect("written");
    let lib = dummy_artefacts(&stage);
    let output = stage.run(&[]).env("KILN_LIB_DIR", lib).output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    assert!(errors(&output).contains("state directory"), "{}", errors(&output));
}

#[test]
fn full_disk() {
    let stage = Stage::new(&["true"]);
    fs::create_dir(stage.root()).expect("made");
    let script = "mount -t tmpfs -o nr_inodes=2 kiln-test \"$1\" && touch \"$1/full\" || exit 99; \
                  shift; exec \"$@\"";
    let mut run = stage.run(&[]);
    run.env("KILN_LIB_DIR", dummy_artefacts(&stage));
    let mut command = std::process::Command::new("unshare");
    command.args(["--mount", "sh", "-c", script, "sh"]).arg(stage.root());
    command.arg(run.get_program()).args(run.get_args());
    for (name, value) in run.get_envs() {
        command.env(name, value.unwrap_or_default());
    }
    let output = command.output().expect("unshare runs");
    let errors = errors(&output);
    assert_ne!(output.status.code(), Some(99), "mounting a tmpfs needs root: {errors}");
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(errors.contains("state directory") && errors.contains("No space left"), "{errors}");
}

#[test]
fn callers_without_root_are_told_what_they_lack() {
    let stage = Stage::new(&["true"]);
    for path in [stage.path().to_owned(), stage.bundle()] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
    }
    let root = tempfile::tempdir().expect("temporary directory");
    std::os::unix::fs::chown(root.path(), Some(65534), Some(65534)).expect("changed");
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_kiln"));
    command.arg("--root").arg(root.path()).args(["run", "--engine", "emulated", "--bundle"]);
    let output = command.arg(stage.bundle()).arg("test").uid(65534).gid(65534).output();
    let output = output.expect("kiln runs");
    let errors = errors(&output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in ["containers need root", "user 65534 lacks CAP_SYS_ADMIN", "sudo"] {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert_eq!(fs::read_dir(root.path()).expect("read").count(), 0, "something is left behind");
}

#[test]
fn errors_reach_the_log_as_json() {
    let stage = Stage::new(&["true"]);
    stage.write_config_text("[");
    let log = stage.path().join("log.json");
    let mut command = stage.kiln();
    command.arg("--log").arg(&log).args(["--log-format", "json", "run", "--bundle"]);
    let output = command.arg(stage.bundle()).arg("test").output().expect("runs");
    assert_eq!(output.status.code(), Some(1));
    let text = fs::read_to_string(log).expect("log");
    let last = text.lines().last().expect("a line");
    let line: serde_json::Value = serde_json::from_str(last).expect("JSON");
    assert_eq!(line["level"], "error");
    assert!(line["msg"].as_str().expect("text").contains("config.json"));
    assert!(line["time"].is_string());
}

#[test]
fn unreadable_kernel_of_vm_run() {
    let stage = Stage::new(&["true"]);
    let image = stage.path().join("disk");
    fs::write(&image, "").expect("written");
    fs::set_permissions(&image, fs::Permissions::from_mode(0o600)).expect("set");
    let kernel = env!("CARGO_BIN_EXE_kiln");
    for (args, word) in [
        (["--kernel", "/no/such/kernel", "--cpus", "1"], "--kernel: /no/such/kernel"),
        (["--kernel", kernel, "--initrd", "/no/such/initrd"], "--initrd: /no/such/initrd"),
        (["--kernel", kernel, "--disk", "/no/such/disk:ro"], "--disk: /no/such/disk"),
    ] {
        let output = stage.kiln().args(["vm", "run"]).args(args).output().expect("runs");
        assert_eq!(output.status.code(), Some(1));
        assert!(errors(&output).contains(word), "{word:?}: {}", errors(&output));
    }
}
