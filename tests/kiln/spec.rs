//! `kiln spec`.

use std::fs;

use assert_cmd::Command;

fn kiln() -> Command {
    Command::new(env!("CARGO_BIN_EXE_kiln"))
}

#[test]
fn configuration_is_written_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    kiln().args(["spec", "--bundle"]).arg(dir.path()).assert().success();
    let written = fs::read(dir.path().join("config.json")).expect("written");
    let again = kiln().args(["spec", "--bundle"]).arg(dir.path()).assert().failure().code(1);
    let errors = String::from_utf8_lossy(&again.get_output().stderr).into_owned();
    assert!(errors.contains("config.json exists"), "{errors}");
    assert_eq!(fs::read(dir.path().join("config.json")).expect("still there"), written);
}

#[test]
fn rootless_configuration_maps_the_caller() {
    let dir = tempfile::tempdir().expect("temporary directory");
    kiln().args(["spec", "--rootless"]).current_dir(dir.path()).assert().success();
    let text = fs::read(dir.path().join("config.json")).expect("written");
    let config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
    let caller = nix::unistd::geteuid().as_raw();
    assert_eq!(config["linux"]["uidMappings"][0]["hostID"], caller);
    let namespaces = config["linux"]["namespaces"].as_array().expect("list");
    assert!(namespaces.iter().any(|namespace| namespace["type"] == "user"));
}
