//! A caller that may have no more files, processes or memory: it is told so, with what would help, and
//! nothing is left.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use kiln_selftest_guests::SHUTDOWN;
use nix::sys::resource::{Resource, setrlimit};

use crate::host::{Host, mark, marked};
use crate::stage::{Stage, create, errors, succeeds};

/// Calls a command whose limit is this.
fn limited(mut command: Command, resource: Resource, limit: u64) -> Output {
    // SAFETY: only a system call is made.
    unsafe { command.pre_exec(move || Ok(setrlimit(resource, limit, limit)?)) };
    command.stdin(Stdio::null()).output().expect("kiln")
}

/// A cgroup with a limit, of whichever version the machine's are; removed in the end.
struct Group(PathBuf);

impl Group {
    fn new(
        stage: &Stage,
        controller: &str,
        version_1: (&str, &str),
        version_2: (&str, &str),
    ) -> Self {
        let mount = Path::new("/sys/fs/cgroup").join(controller);
        let is_version_1 = mount.is_dir();
        let parent = if is_version_1 { mount } else { "/sys/fs/cgroup".into() };
        let group = Self(parent.join(format!("{}-caller", mark(stage))));
        fs::create_dir(&group.0).expect("these tests need root");
        let (file, value) = if is_version_1 { version_1 } else { version_2 };
        fs::write(group.0.join(file), value).expect("limited");
        group
    }

    /// The cgroup of a sandbox below, as bundles name it.
    fn path_below(&self) -> String {
        let below = self.0.strip_prefix("/sys/fs/cgroup").expect("a cgroup").join("sandbox");
        let controllers = ["pids", "memory"].iter().map(Path::new);
        let mut version_1 =
            controllers.filter_map(|controller| below.strip_prefix(controller).ok());
        let path = version_1.next_back().unwrap_or(&below);
        format!("/{}", path.display())
    }

    /// Runs the bundle there, its sandbox below, for which the limit holds too.
    fn run(&self, stage: &Stage) -> Output {
        let path = self.path_below();
        stage.edit(|config| config["linux"]["cgroupsPath"] = path.into());
        let mut command = stage.run(&[]);
        self.holds(&mut command);
        command.stdin(Stdio::null()).output().expect("kiln")
    }

    /// Has a command run there.
    fn holds(&self, command: &mut Command) {
        let file = self.0.join("cgroup.procs");
        // SAFETY: only system calls are made: so short a path takes no memory.
        unsafe { command.pre_exec(move || fs::write(&file, "0")) };
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // What was just killed may still be on its way out.
        for _ in 0..100 {
            if fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }
}

/// Checks that a command that failed says why.
fn explained(output: &Output, what: &str, words: &[&str]) {
    let errors = errors(output);
    assert!(output.status.code().is_some_and(|code| code != 0), "{what}: {}", output.status);
    assert!(errors.contains("kiln: "), "{what}: {errors}");
    assert!(words.iter().any(|word| errors.contains(word)), "{what}: {errors}");
}

fn exec(stage: &Stage) -> Command {
    let mut command = stage.kiln();
    command.args(["exec", "test", "sh", "-c", "echo said"]);
    command
}

#[test]
fn limit_of_open_files() {
    let stage = marked(&["sh", "-c", "echo said"]);
    let before = Host::look(&stage);
    let words = ["Too many open files", "No file descriptors available"];
    let mut enough = false;
    for limit in [4, 6, 8, 10, 12, 14, 17, 20, 24, 28, 34, 40, 64, 256] {
        let output = limited(stage.run(&[]), Resource::RLIMIT_NOFILE, limit);
        enough = output.status.success();
        if enough {
            assert_eq!(output.stdout, b"said\n");
        } else {
            explained(&output, &format!("run with {limit} files"), &words);
        }
        before.is_as_before(&stage);
    }
    assert!(enough, "256 open files suffice");
}

#[test]
fn limits_of_who_executes_further_programs() {
    let stage = marked(&["sleep", "1000"]);
    let created = create(&stage, &[]);
    assert!(created.status.success(), "{}", errors(&created));
    succeeds(&stage, &["start", "test"]);
    let before = Host::look(&stage);
    let words = ["Too many open files", "No file descriptors available"];
    for limit in [4, 6, 8, 10, 12, 14, 17, 20] {
        let output = limited(exec(&stage), Resource::RLIMIT_NOFILE, limit);
        if output.status.success() {
            assert_eq!(output.stdout, b"said\n");
        } else {
            explained(&output, &format!("exec with {limit} files"), &words);
        }
        before.is_as_before(&stage);
    }
    for tasks in ["1", "2", "3", "4"] {
        let group = Group::new(&stage, "pids", ("pids.max", tasks), ("pids.max", tasks));
        let mut command = exec(&stage);
        group.holds(&mut command);
        let output = command.stdin(Stdio::null()).output().expect("kiln");
        drop(group);
        if output.status.success() {
            assert_eq!(output.stdout, b"said\n");
        } else {
            explained(&output, &format!("exec with {tasks} tasks"), &["limits on processes"]);
        }
        before.is_as_before(&stage);
    }
    assert_eq!(stage.state()["status"], "running");
    succeeds(&stage, &["delete", "--force", "test"]);
}

#[test]
fn limit_of_processes() {
    let stage = marked(&["sh", "-c", "echo said"]);
    for tasks in ["1", "2", "3", "4", "5", "6", "8", "12"] {
        let group = Group::new(&stage, "pids", ("pids.max", tasks), ("pids.max", tasks));
        let before = Host::look(&stage);
        let output = group.run(&stage);
        // QEMU has words of its own for it.
        let words = ["limits on processes", "Resource temporarily unavailable"];
        explained(&output, &format!("run with {tasks} tasks"), &words);
        before.is_as_before(&stage);
    }
}

/// A caller without root has the limit of its user instead. What the machine's process says of it, once
/// it has a user of its own, is `vmm`'s.
#[test]
fn limit_of_a_users_processes() {
    const USER: u32 = 61_234;

    let stage = marked(&["true"]);
    let before = Host::look(&stage);
    let kernel = stage.path().join("kernel");
    fs::write(&kernel, SHUTDOWN.image).expect("written");
    fs::create_dir(stage.root()).expect("made");
    chown(stage.root(), Some(USER), Some(USER)).expect("changed");
    for path in [stage.path(), &kernel] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("set");
    }
    let mut command = stage.kiln();
    command.args(["vm", "run", "--engine", "emulated", "--memory", "64", "--kernel"]);
    command.arg(&kernel).uid(USER).gid(USER);
    let output = limited(command, Resource::RLIMIT_NPROC, 1);
    explained(&output, "a machine with 1 process", &["limits on processes"]);
    before.is_as_before(&stage);
}

#[test]
fn limit_of_memory() {
    let stage = marked(&["sh", "-c", "echo said"]);
    let limit = "50331648";
    let (version_1, version_2) = (("memory.limit_in_bytes", limit), ("memory.max", limit));
    let group = Group::new(&stage, "memory", version_1, version_2);
    let before = Host::look(&stage);
    let output = group.run(&stage);
    let words = ["the host's kernel killed it for want of memory"];
    explained(&output, "run in 48 MiB", &words);
    before.is_as_before(&stage);
}

#[test]
fn limit_of_address_space() {
    let stage = marked(&["sh", "-c", "echo said"]);
    let before = Host::look(&stage);
    for mebibytes in [20, 24, 32, 64, 200, 1200] {
        let output = limited(stage.run(&[]), Resource::RLIMIT_AS, mebibytes << 20);
        let errors = errors(&output);
        let what = format!("run in {mebibytes} MiB of addresses: {}: {errors}", output.status);
        assert!(!output.status.success(), "{what}");
        let words = ["memory", "shared libraries", "limits on processes"];
        assert!(words.iter().any(|word| errors.contains(word)), "{what}");
        before.is_as_before(&stage);
    }
}
