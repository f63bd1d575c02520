//! Bundles made to lead kiln elsewhere: whatever they name, nothing of the host beside them is
//! touched.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::{Output, Stdio};

use serde_json::{Value, json};

use crate::stage::{Stage, errors};

/// A stage with a folder beside the bundle that must stay as it is.
struct Watched {
    stage: Stage,
}

impl Watched {
    fn new(args: &[&str]) -> Self {
        let stage = Stage::new(args);
        let outside = stage.path().join("outside");
        fs::create_dir(&outside).expect("made");
        fs::write(outside.join("secret"), "secret").expect("written");
        Self { stage }
    }

    fn outside(&self) -> PathBuf {
        self.stage.path().join("outside")
    }

    /// Links `name` in the root file system to the folder outside, by a path that leads there from
    /// the host's root and by one that climbs.
    fn link(&self, name: &str) {
        let outside = self.outside();
        let inside = self.stage.rootfs();
        symlink(&outside, inside.join(name)).expect("linked");
        let climbing = format!("../../../../../../../..{}", outside.display());
        symlink(climbing, inside.join(format!("{name}-climbing"))).expect("linked");
    }

    fn run(&self) -> Output {
        let output = self.stage.run(&[]).stdin(Stdio::null()).output().expect("kiln runs");
        assert!(self.stage.is_clean(), "something is left behind: {}", errors(&output));
        let names: Vec<_> = fs::read_dir(self.outside())
            .expect("read")
            .map(|entry| entry.expect("an entry").file_name())
            .collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(fs::read(self.outside().join("secret")).expect("read"), b"secret");
        output
    }

    fn refused(&self, words: &[&str]) {
        let output = self.run();
        let errors = errors(&output);
        assert_eq!(output.status.code(), Some(1), "{errors}");
        for word in words {
            assert!(errors.contains(word), "{word:?} is missing in: {errors}");
        }
    }
}

#[test]
fn configurations_of_any_size_and_depth() {
    let watched = Watched::new(&["true"]);
    let path = watched.stage.bundle().join("config.json");
    let file = fs::File::create(&path).expect("made");
    file.set_len(100 << 20).expect("sized");
    watched.refused(&["config.json", "exceed the limit"]);
    watched.stage.write_config_text(&"[".repeat(1 << 20));
    watched.refused(&["config.json", "line 1 column"]);
    let deep = format!("{}{}{}", "{\"annotations\":".repeat(1000), "{}", "}".repeat(1000));
    watched.stage.write_config_text(&deep);
    watched.refused(&["config.json", "line 1 column"]);
}

#[test]
fn configurations_that_are_no_files() {
    let watched = Watched::new(&["true"]);
    let path = watched.stage.bundle().join("config.json");
    fs::remove_file(&path).expect("removed");
    symlink("/dev/zero", &path).expect("linked");
    watched.refused(&["config.json", "not a regular file"]);
    fs::remove_file(&path).expect("removed");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("made");
    watched.refused(&["config.json", "not a regular file"]);
}

#[test]
fn a_root_file_system_that_is_a_link() {
    let watched = Watched::new(&["true"]);
    let link = watched.stage.bundle().join("elsewhere");
    symlink(watched.outside(), &link).expect("linked");
    symlink(watched.stage.path(), watched.stage.bundle().join("up")).expect("linked");
    for path in [json!("elsewhere"), json!("./elsewhere//"), json!(link), json!("up/outside")] {
        watched.stage.edit(|config| config["root"]["path"] = path.clone());
        watched.refused(&["root.path", "symbolic link"]);
    }
}

/// A step that checks that `/link/x` and `/link-climbing/x` are mounts with a file, then writes.
fn through_links(read_only: bool) -> Watched {
    let script = "for l in link link-climbing; do \
                    test \"$(cat /$l/x/file)\" = volume && echo x >/$l/x/made || exit 9; \
                  done; echo x >/link/made 2>/dev/null; exit 0";
    let watched = Watched::new(&["sh", "-c", script]);
    watched.link("link");
    let volume = watched.stage.path().join("volume");
    fs::create_dir(&volume).expect("made");
    fs::write(volume.join("file"), "volume").expect("written");
    watched.stage.edit(|config| {
        config["root"]["readonly"] = json!(read_only);
        let mounts = config["mounts"].as_array_mut().expect("a list");
        for link in ["link", "link-climbing"] {
            mounts.push(json!({
                "destination": format!("/{link}/x"), "type": "bind", "source": volume,
                "options": ["rbind", "rw"],
            }));
        }
    });
    watched
}

#[test]
fn mounts_through_links_land_in_the_root_file_system() {
    for read_only in [false, true] {
        let watched = through_links(read_only);
        let output = watched.run();
        assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
        assert!(watched.stage.path().join("volume/made").exists());
    }
}

#[test]
fn what_a_step_reaches_through_links_is_its_own() {
    let script = "cat /link/secret /link-climbing/secret && exit 9; \
                  echo x >/link/secret; echo x >/link-climbing/secret; exit 0";
    let watched = Watched::new(&["sh", "-c", script]);
    watched.link("link");
    let output = watched.run();
    assert_eq!(output.status.code(), Some(0), "{}", errors(&output));
}

#[test]
fn a_proc_that_leads_elsewhere() {
    // Setting a container up writes below /proc: where it is a link, nothing but the guest's own.
    let watched = Watched::new(&["sh", "-c", "exit 3"]);
    let proc = watched.stage.rootfs().join("proc");
    fs::remove_dir(&proc).expect("removed");
    symlink(watched.outside(), &proc).expect("linked");
    let output = watched.run();
    assert!(matches!(output.status.code(), Some(1 | 3)), "{}", errors(&output));

    let watched = Watched::new(&["sh", "-c", "exit 3"]);
    watched.stage.edit(|config| {
        let tricks = ["/proc/1/root", "/proc/self/fd", "/proc/../../../..", "/../outside"];
        let mounts = config["mounts"].as_array_mut().expect("a list");
        mounts.extend(tricks.map(|destination| -> Value {
            json!({"destination": destination, "type": "tmpfs", "source": "tmpfs"})
        }));
    });
    let output = watched.run();
    assert!(matches!(output.status.code(), Some(1 | 3)), "{}", errors(&output));
}
