//! A machine within the machine, on which kiln is installed as `docs/install.md` says.
//!
//! [`on_stage`] executes the test's program again in namespaces of its own: mounts, network, IPC,
//! host name and process ids. There `/run` is empty, what is written to `/etc`, `/usr/local` and
//! `/var` is gone afterwards, and the end of the test is the end of every process on the stage, however it
//! comes about. Files that engines keep are in a folder of the disk, removed with the stage: image
//! layers are overlays, as on users' machines.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::image::Image;

/// Says to the program that it is on a stage, and where the stage's folder is.
const FOLDER: &str = "KILN_STAGE";

/// How users are told to install kiln; the stage writes the same files.
const INSTALL: &str = include_str!("../../docs/install.md");

/// What differs on test machines: whoever is root there may not raise limits, and there is no
/// systemd.
const MACHINE_CONF: &str = r#"
[containers]
default_ulimits = ["nofile=20000:20000", "nproc=32768:32768"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
"#;

/// Makes the stage's file systems; the arguments are its folder and the program to go on with.
/// The shell stays to reap the processes whose parents have ended.
const SET_UP: &str = r#"
set -e
folder=$1; shift
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/netns /run/lock
for dir in /etc /usr/local /var; do
    layer=$folder/layers$dir
    mkdir -p "$layer/upper" "$layer/work"
    mount -t overlay -o "lowerdir=$dir,upperdir=$layer/upper,workdir=$layer/work" overlay "$dir"
done
ip link set lo up
set +e
"$@"
exit "$?"
"#;

/// How long a command may take on a loaded machine.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Runs a test on a stage of its own. `test` must be a closure that stands in the test's function.
pub fn on_stage<T: Fn(&Stage)>(test: T) {
    if let Some(folder) = std::env::var_os(FOLDER) {
        return test(&Stage::set(folder.into()));
    }
    let folder = tempfile::tempdir().expect("temporary directory");
    let program = std::env::current_exe().expect("the test's program");
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--mount-proc"])
        .args(["--kill-child", "sh", "-c", SET_UP, "sh"])
        .arg(folder.path())
        .arg(program)
        .args(["--exact", name_of::<T>(), "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder.path())
        .env("KILN_LIB_DIR", lib_dir())
        .stdin(Stdio::null());
    let tenancy = Tenancy::begin();
    let status = command.status().expect("unshare, of util-linux, runs");
    drop(tenancy);
    assert!(status.success(), "the test on the stage failed, or the stage needs root: {status}");
}

/// The cgroups that engines put containers into stay when they are empty. Whoever is the last on a
/// stage removes them: as long as there are others, one may be about to be used.
struct Tenancy(fs::File);

impl Tenancy {
    fn begin() -> Self {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("callers.lock");
        let lock = fs::File::create(path).expect("lock");
        lock.lock_shared().expect("lock");
        Self(lock)
    }
}

impl Drop for Tenancy {
    fn drop(&mut self) {
        let freed = self.0.unlock();
        if freed.is_err() || self.0.try_lock().is_err() {
            return;
        }
        for hierarchy in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
            for engine in ["libpod_parent", "docker", "default", "buildkit", "kiln-pods"] {
                remove_empty(&hierarchy.path().join(engine));
            }
        }
    }
}

/// Removes a cgroup and those below it, but none that holds a process.
fn remove_empty(cgroup: &Path) {
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_empty(&entry.path());
        }
    }
    // What is not to be removed isn't.
    let _ = fs::remove_dir(cgroup);
}

/// The name of the test that a closure stands in, as the test's program knows it.
fn name_of<T>() -> &'static str {
    let name = std::any::type_name::<T>();
    let name = name.strip_suffix("::{{closure}}").expect("a closure in the test's function");
    name.split_once("::").expect("a path").1
}

/// Where the guest's kernel and agent are.
fn lib_dir() -> PathBuf {
    let built = || Path::new(env!("CARGO_MANIFEST_DIR")).join("out/lib/kiln");
    std::env::var_os("KILN_LIB_DIR").map_or_else(built, PathBuf::from)
}

/// The stage, as the test on it sees it.
pub struct Stage {
    folder: PathBuf,
}

impl Stage {
    fn set(folder: PathBuf) -> Self {
        let stage = Self { folder };
        for dir in ["/usr/local/bin", "/usr/local/lib/kiln", "/etc/kiln"] {
            fs::create_dir_all(dir).expect("directory");
        }
        fs::copy(env!("CARGO_BIN_EXE_kiln"), "/usr/local/bin/kiln").expect("kiln");
        for file in fs::read_dir(lib_dir()).expect("the guest's kernel and agent") {
            let file = file.expect("entry");
            let installed = Path::new("/usr/local/lib/kiln").join(file.file_name());
            std::os::unix::fs::symlink(file.path(), installed).expect("link");
        }
        // Whether KVM runs Linux here isn't what these tests are about.
        fs::write("/etc/kiln/config.toml", "engine = \"emulated\"\n").expect("configuration");
        stage
    }

    /// A path in the stage's folder on the disk.
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Configures podman and buildah as users are told to, with the image in their store.
    pub fn for_podman(&self) {
        install("/etc/containers/containers.conf.d/kiln.conf");
        write("/etc/containers/containers.conf.d/machine.conf", MACHINE_CONF);
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\nrunroot = \"/run/containers/storage\"\n\
             graphroot = \"{}\"\n",
            self.path("storage").display()
        );
        write("/etc/containers/storage.conf", &storage);
        write(
            "/etc/containers/policy.json",
            r#"{"default": [{"type": "insecureAcceptAnything"}]}"#,
        );
        let archive = Image::new(self).archive();
        self.ok(&["podman", "load", "--quiet", "--input", &archive]);
    }

    /// Starts a program that runs as long as the result lives; it says what it does in a file.
    pub fn start(&self, command: &[&str]) -> Daemon {
        let log = self.path(&format!("{}.log", command[0]));
        let output = || fs::File::options().append(true).create(true).open(&log).expect("log");
        let mut process = Command::new(command[0]);
        process.args(&command[1..]).stdin(Stdio::null()).stdout(output()).stderr(output());
        Daemon { process: process.spawn().expect("it is installed"), log }
    }

    /// How many containers kiln knows.
    pub fn containers(&self) -> usize {
        self.ok(&["kiln", "list", "--quiet"]).lines().count()
    }

    /// Runs a command to its end.
    pub fn run(&self, command: &[&str]) -> Output {
        // A command that hangs is ended rather than the test: what it said is shown.
        let seconds = PATIENCE.as_secs().to_string();
        let mut process = Command::new("timeout");
        process.args(["--foreground", "--kill-after=5", &seconds]).args(command);
        let output = process.stdin(Stdio::null()).output().expect("timeout, of coreutils, runs");
        eprintln!("{command:?}: {}\n{}{}", output.status, text(&output.stdout), errors(&output));
        output
    }

    /// Runs a command that succeeds; gives what it printed.
    pub fn ok(&self, command: &[&str]) -> String {
        let output = self.run(command);
        assert!(output.status.success(), "{command:?}: {}: {}", output.status, errors(&output));
        text(&output.stdout)
    }

    /// Runs a command that fails with a status; gives what it wrote to standard error.
    pub fn fails(&self, status: i32, command: &[&str]) -> String {
        let output = self.run(command);
        assert_eq!(output.status.code(), Some(status), "{command:?}: {}", errors(&output));
        errors(&output)
    }
}

/// A program in the background.
pub struct Daemon {
    process: Child,
    log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}:\n{}", self.log.display(), fs::read_to_string(&self.log).expect("log"));
        }
        // It has the time to take its mounts away; the stage's end is the end of what is left.
        let _ = Command::new("kill").arg(self.process.id().to_string()).status();
        let _ = self.process.wait();
    }
}

/// Waits until something is so.
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came: {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Writes the file of that path as `docs/install.md` shows it.
pub fn install(path: &str) {
    write(path, documented(path));
}

/// The block of `docs/install.md` below the line that ends with the file's path in backquotes.
pub fn documented(path: &str) -> &'static str {
    let block = INSTALL.split_once(&format!("`{path}`:\n```")).and_then(|(_, rest)| {
        let (_language, rest) = rest.split_once('\n')?;
        Some(rest.split_once("\n```")?.0)
    });
    block.unwrap_or_else(|| panic!("docs/install.md does not show {path}"))
}

/// Writes a file, with the directories that it needs.
pub fn write(path: &str, content: &str) {
    let path = Path::new(path);
    fs::create_dir_all(path.parent().expect("a folder")).expect("directory");
    fs::write(path, content).expect("file");
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a command wrote to standard error.
pub fn errors(output: &Output) -> String {
    text(&output.stderr)
}
