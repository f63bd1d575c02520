//! Overlays of the host's directories among a bundle's mounts.

use std::fs;
use std::process::Stdio;

use serde_json::json;

use crate::stage::{Stage, errors};

#[test]
fn directories_of_the_host_are_laid_over_each_other() {
    let script = "cat /v/f && echo new > /v/f && rm /v/gone && cat /v/f /ro/f && touch /ro/x";
    let stage = Stage::new(&["sh", "-c", script]);
    let made = |name: &str| {
        let directory = stage.path().join(name);
        fs::create_dir(&directory).expect("directory");
        directory
    };
    let (lower, other, upper, work) = (made("lower"), made("other"), made("upper"), made("work"));
    fs::write(lower.join("f"), "old\n").expect("file");
    fs::write(lower.join("gone"), "").expect("file");
    fs::write(other.join("f"), "other\n").expect("file");
    let (lower_path, other_path) = (lower.display(), other.display());
    let writable = [
        format!("lowerdir={lower_path}"),
        format!("upperdir={}", upper.display()),
        format!("workdir={}", work.display()),
        "private".to_owned(),
    ];
    let read_only = [format!("lowerdir={other_path}:{lower_path}"), "private".to_owned()];
    let overlay = |destination: &str, options: &[String]| {
        json!({
            "destination": destination, "type": "overlay", "source": "overlay", "options": options,
        })
    };
    stage.edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("mounts");
        mounts.push(overlay("/v", &writable));
        mounts.push(overlay("/ro", &read_only));
    });
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "old\nnew\nother\n");
    assert!(errors(&output).contains("Read-only"), "{}", errors(&output));
    assert_eq!(fs::read_to_string(lower.join("f")).expect("file"), "old\n");
    assert!(lower.join("gone").exists());
    assert_eq!(fs::read_to_string(upper.join("f")).expect("file"), "new\n");
    assert!(stage.is_clean());
}

#[test]
fn a_directory_that_is_not_there_is_named() {
    let stage = Stage::new(&["true"]);
    stage.edit(|config| {
        let mount = json!({
            "destination": "/v", "type": "overlay", "source": "overlay",
            "options": ["lowerdir=/nonexistent/kiln"],
        });
        config["mounts"] = json!([mount]);
    });
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
    assert_eq!(output.status.code(), Some(1));
    let errors = errors(&output);
    assert!(errors.contains("mounts[0]: overlay: ") && errors.contains("nonexistent"), "{errors}");
    assert!(stage.is_clean());
}
