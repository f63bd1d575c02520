//! The image that the engines run: busybox, and the machine's own shell with its libraries.
//!
//! It is an OCI archive with one layer, which podman, buildah and containerd take alike.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use crate::stage::Stage;

/// The image's name in every store.
pub const NAME: &str = "localhost/kiln-test:latest";

/// The name of an image that waits: a pod's sandbox.
pub const PAUSE: &str = "localhost/kiln-pause:latest";

/// Files of the machine, of the packages `dash` and `libc6`: a dynamically linked program.
const SHELL: [&str; 3] =
    ["/bin/dash", "/lib64/ld-linux-x86-64.so.2", "/lib/x86_64-linux-gnu/libc.so.6"];

const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbuilder:x:1000:1000::/home/builder:/bin/sh\n";
const GROUP: &str = "root:x:0:\nbuilder:x:1000:\nextra:x:2000:builder\n";

/// The image as a folder on the stage.
pub struct Image {
    folder: PathBuf,
    layout: PathBuf,
}

impl Image {
    /// Makes the image.
    pub fn new(stage: &Stage) -> Self {
        Self::make(stage, &[(NAME, &["sh"])])
    }

    /// Makes the image, and of the same files that of a pod's sandbox.
    pub fn for_pods(stage: &Stage) -> Self {
        Self::make(stage, &[(NAME, &["sh"]), (PAUSE, &["sleep", "1000000"])])
    }

    fn make(stage: &Stage, named: &[(&str, &[&str])]) -> Self {
        let image = Self { folder: stage.path("image"), layout: stage.path("image/layout") };
        fs::create_dir_all(image.layout.join("blobs/sha256")).expect("directory");
        image.fill_layout(named);
        image
    }

    /// Path of its only layer, uncompressed.
    pub fn layer(&self) -> String {
        self.folder.join("layer.tar").display().to_string()
    }

    /// Path of the archive.
    pub fn archive(&self) -> String {
        let archive = self.folder.join("archive.tar");
        pack(&self.layout, &archive);
        archive.display().to_string()
    }

    fn fill_layout(&self, named: &[(&str, &[&str])]) {
        let rootfs = self.folder.join("rootfs");
        fill_rootfs(&rootfs);
        let layer = self.folder.join("layer.tar");
        pack(&rootfs, &layer);
        let layer =
            self.add("application/vnd.oci.image.layer.v1.tar", fs::read(layer).expect("layer"));
        let manifests: Vec<Value> =
            named.iter().map(|(name, command)| self.add_manifest(name, command, &layer)).collect();
        let index = json!({"schemaVersion": 2, "manifests": manifests});
        let version = json!({"imageLayoutVersion": "1.0.0"});
        for (name, content) in [("index.json", index), ("oci-layout", version)] {
            fs::write(self.layout.join(name), content.to_string()).expect("layout");
        }
    }

    /// Adds an image of one layer that runs a command; gives its descriptor.
    fn add_manifest(&self, name: &str, command: &[&str], layer: &Value) -> Value {
        let config = json!({
            "architecture": "amd64",
            "os": "linux",
            "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": command},
            "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]},
            "history": [{"created_by": "the machine's packages"}],
        });
        let config = self.add_json("application/vnd.oci.image.config.v1+json", &config);
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "config": config, "layers": [layer],
        });
        let mut manifest = self.add_json(kind, &manifest);
        manifest["annotations"] = json!({
            "org.opencontainers.image.ref.name": name,
            "io.containerd.image.name": name,
        });
        manifest
    }

    /// Adds a blob; gives its descriptor.
    fn add(&self, kind: &str, content: Vec<u8>) -> Value {
        let temporary = self.folder.join("blob");
        fs::write(&temporary, &content).expect("blob");
        let output = Command::new("sha256sum").arg(&temporary).output().expect("sha256sum");
        let digest = String::from_utf8(output.stdout).expect("text");
        let digest = digest.split_whitespace().next().expect("a digest");
        fs::rename(temporary, self.layout.join("blobs/sha256").join(digest)).expect("blob");
        json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": content.len()})
    }

    fn add_json(&self, kind: &str, content: &Value) -> Value {
        self.add(kind, content.to_string().into_bytes())
    }
}

/// Unpacks the image's root file system into a directory.
pub fn fill_rootfs(rootfs: &Path) {
    for (directory, mode) in
        [("bin", 0o755), ("etc", 0o755), ("root", 0o700), ("home/builder", 0o755), ("tmp", 0o1777)]
    {
        let directory = rootfs.join(directory);
        fs::create_dir_all(&directory).expect("directory");
        fs::set_permissions(directory, fs::Permissions::from_mode(mode)).expect("mode");
    }
    std::os::unix::fs::chown(rootfs.join("home/builder"), Some(1000), Some(1000)).expect("owner");
    let busybox = rootfs.join("bin/busybox");
    fs::copy("/bin/busybox", &busybox).expect("busybox-static is installed");
    let list = Command::new(&busybox).arg("--list").output().expect("busybox");
    let list = String::from_utf8(list.stdout).expect("names");
    for applet in list.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", rootfs.join("bin").join(applet)).expect("link");
    }
    for file in SHELL {
        let copy = rootfs.join(file.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().expect("a folder")).expect("directory");
        fs::copy(file, copy).expect("the machine's shell");
    }
    fs::write(rootfs.join("etc/passwd"), PASSWD).expect("users");
    fs::write(rootfs.join("etc/group"), GROUP).expect("groups");
}

fn pack(directory: &Path, archive: &Path) {
    let mut tar = Command::new("tar");
    tar.args(["--numeric-owner", "-C"]).arg(directory).arg("-cf").arg(archive).arg(".");
    assert!(tar.status().expect("tar runs").success());
}
