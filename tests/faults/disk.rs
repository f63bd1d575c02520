//! File systems that are full: the state directory's and the container's own.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use crate::host::{Host, marked};
use crate::stage::{create, errors, succeeds, wait_for};

/// The calling thread, and what it starts, have mounts of their own from here on.
fn own_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).expect("these tests need root");
    let flags = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, flags, None::<&str>).expect("private");
}

/// A file system of a certain size.
fn small(at: &Path, size: &str) {
    fs::create_dir_all(at).expect("made");
    mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(size)).expect("mounted");
}

/// Takes all the room that is left.
fn fill(directory: &Path) {
    let mut ballast = File::create(directory.join("ballast")).expect("made");
    for size in [1 << 16, 1 << 12, 1] {
        while ballast.write_all(&vec![b'x'; size]).is_ok() {}
    }
}

fn empty(directory: &Path) {
    fs::remove_file(directory.join("ballast")).expect("removed");
}

fn refused(output: &Output, words: &[&str]) {
    let errors = errors(output);
    assert_eq!(output.status.code(), Some(1), "{errors}");
    for word in words.iter().chain(&["No space left on device"]) {
        assert!(errors.contains(word), "{word:?} is missing in: {errors}");
    }
    assert_eq!(errors.matches("kiln: ").count(), 1, "{errors}");
}

#[test]
fn state_directory_without_room_takes_no_container() {
    own_mounts();
    let stage = marked(&["true"]);
    let before = Host::look(&stage);
    // One file more each time, until there is room for all.
    for files in 1.. {
        assert!(files < 20, "no room is enough");
        small(&stage.root(), &format!("size=1m,nr_inodes={files}"));
        let output = create(&stage, &[]);
        let made = output.status.success();
        if !made {
            refused(&output, &[]);
            let mut left = fs::read_dir(stage.root()).expect("read");
            assert!(left.next().is_none(), "with {files} inodes");
        }
        succeeds(&stage, &["delete", "--force", "test"]);
        nix::mount::umount(&stage.root()).expect("nothing uses it");
        if made {
            break;
        }
    }
    for pages in 1..3 {
        small(&stage.root(), &format!("size={}k", 4 * pages));
        fill(&stage.root());
        refused(&create(&stage, &[]), &["state"]);
        empty(&stage.root());
        assert!(stage.is_clean());
        nix::mount::umount(&stage.root()).expect("nothing uses it");
    }
    fs::remove_dir(stage.root()).expect("removed");
    before.is_as_before(&stage);
}

#[test]
fn container_lives_on_when_the_state_directory_fills_up() {
    own_mounts();
    let stage = marked(&["sh", "-c", "trap 'exit 6' TERM; while :; do sleep 0.1; done"]);
    let small_files = stage.path().join("small");
    small(&small_files, "size=4k");
    fill(&small_files);
    small(&stage.root(), "size=64k");
    let before = Host::look(&stage);

    // A pid file that can't be written is a create that fails.
    let pid_file = small_files.join("pid");
    refused(&create(&stage, &["--pid-file", pid_file.to_str().expect("text")]), &["pid file"]);
    assert_eq!(fs::read_dir(&small_files).expect("read").count(), 1);
    before.is_as_before(&stage);

    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    fill(&stage.root());
    succeeds(&stage, &["start", "test"]);
    assert_eq!(stage.state()["status"], "running");
    for _ in 0..3 {
        succeeds(&stage, &["pause", "test"]);
        assert_eq!(stage.state()["status"], "paused");
        succeeds(&stage, &["resume", "test"]);
        assert_eq!(stage.state()["status"], "running");
    }
    assert_eq!(succeeds(&stage, &["exec", "test", "sh", "-c", "echo said"]), "said\n");
    succeeds(&stage, &["kill", "test", "TERM"]);
    wait_for(&stage, "stopped");
    succeeds(&stage, &["delete", "test"]);
    empty(&stage.root());
    before.is_as_before(&stage);
}

#[test]
fn step_whose_root_file_system_is_full_is_told_as_on_any_disk() {
    own_mounts();
    let script = "dd if=/dev/zero of=/big bs=64k; echo dd $?; echo x >/more || echo no more; \
                  head -c 100 /big >/dev/null && echo readable; exit 4";
    let stage = marked(&["sh", "-c", script]);
    // The same files on a disk that has little more room than they take.
    let copy = stage.path().join("copy");
    let copied = |from: &Path, to: &Path| {
        Command::new("cp").arg("-a").arg(from).arg(to).status().expect("cp").success()
    };
    assert!(copied(&stage.rootfs(), &copy));
    small(&stage.rootfs(), "size=4m");
    assert!(copied(&copy.join("."), &stage.rootfs()));
    let before = Host::look(&stage);
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln");
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert_eq!(output.status.code(), Some(4), "{said}{}", errors(&output));
    assert_eq!(said, "dd 1\nno more\nreadable\n");
    assert!(errors(&output).contains("No space left on device"), "{}", errors(&output));
    before.is_as_before(&stage);

    // Nor can kiln put a mount point there.
    small(&stage.rootfs().join("tmp"), "size=4k,nr_inodes=1");
    stage.edit(|config| {
        let mounts = config["mounts"].as_array_mut().expect("a list");
        mounts.push(json!({
            "destination": "/tmp/place", "type": "bind", "source": "/usr",
            "options": ["rbind", "ro"],
        }));
    });
    let output = stage.run(&[]).stdin(Stdio::null()).output().expect("kiln");
    refused(&output, &["tmp/place"]);
}
