//! The container's tree.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};

use kiln_protocol::{ExitStatus, FailurePhase};
use serde_json::{Value, json};

use crate::guest::{Guest, shell};

fn add_mount(config: &mut Value, mount: Value) -> usize {
    let mounts = config["mounts"].as_array_mut().expect("a list");
    mounts.push(mount);
    mounts.len() - 1
}

#[test]
fn masked_paths_are_empty_and_read_only_paths_are_read_only() {
    let mut guest = Guest::start();
    let mut config = shell(
        "cat /secret | wc -c; ls -A /hidden | wc -l; \
         echo x > /fixed/file || echo refused; cat /fixed/file; \
         echo 1 > /proc/sys/net/ipv4/ip_forward || echo refused",
    );
    fs::write(guest.rootfs().join("secret"), "secret").expect("file");
    for name in ["hidden", "fixed"] {
        fs::create_dir(guest.rootfs().join(name)).expect("directory");
        fs::write(guest.rootfs().join(name).join("file"), "as it was\n").expect("file");
    }
    config["linux"]["maskedPaths"] = json!(["/secret", "/hidden", "/not/there"]);
    config["linux"]["readonlyPaths"] = json!(["/fixed", "/proc/sys", "/not/there"]);
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "0\n0\nrefused\nas it was\nrefused\n", "{}", outcome.stderr);
}

#[test]
fn read_only_root_keeps_its_mounts_as_they_are() {
    let mut guest = Guest::start();
    let mut config = shell("touch /x || echo root refused; touch /scratch/x && echo mount taken");
    config["root"]["readonly"] = json!(true);
    add_mount(&mut config, json!({"destination": "/scratch", "type": "tmpfs"}));
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "root refused\nmount taken\n", "{}", outcome.stderr);
}

#[test]
fn bind_mounts_come_from_the_share_with_their_options() {
    let mut guest = Guest::start();
    let mut config = shell(
        "cat /in/file; touch /in/new && echo taken; cat /etc/one; \
         touch /locked/x || echo refused; /locked/tool || echo not executable",
    );
    let index = add_mount(
        &mut config,
        json!({"destination": "/in", "type": "bind", "source": "/x", "options": ["rbind"]}),
    );
    let bind = |destination: &str, options: &[&str]| json!({"destination": destination, "type": "none", "source": "/y", "options": options});
    add_mount(&mut config, bind("/etc/one", &["bind", "ro", "rprivate"]));
    add_mount(&mut config, bind("/locked", &["rbind", "rro", "noexec", "nosuid"]));
    for offset in [0, 2] {
        fs::create_dir(guest.shared(index + offset)).expect("directory");
    }
    fs::write(guest.shared(index).join("file"), "from the host\n").expect("file");
    fs::write(guest.shared(index + 1), "one file\n").expect("file");
    let tool = guest.shared(index + 2).join("tool");
    fs::write(&tool, "#!/bin/sh\necho executed\n").expect("file");
    fs::set_permissions(&tool, fs::Permissions::from_mode(0o755)).expect("mode");
    let binds = [(0, false), (1, true), (2, false)]
        .map(|(offset, is_file)| guest.bind(index + offset, is_file));
    let outcome = guest.run_with(&config, binds.into()).expect("runs");
    let expected = "from the host\ntaken\none file\nrefused\nnot executable\n";
    assert_eq!(outcome.stdout, expected, "{}", outcome.stderr);
    assert!(guest.shared(index).join("new").exists());
}

#[test]
fn bind_mount_that_the_host_did_not_share_is_refused() {
    let mut guest = Guest::start();
    let mut config = shell("true");
    let index = add_mount(
        &mut config,
        json!({"destination": "/in", "type": "bind", "source": "/", "options": ["rbind"]}),
    );
    let refusal = guest.fail(&config);
    assert!(refusal.message.contains(&format!("mounts[{index}]")), "{}", refusal.message);
    assert_eq!(refusal.phase, FailurePhase::Config);
}

#[test]
fn mounts_have_their_options_sizes_and_modes() {
    let mut guest = Guest::start();
    let mut config = shell("grep ' /scratch ' /proc/self/mounts; stat -c %a /scratch");
    let options = ["nosuid", "nodev", "noexec", "size=1m", "mode=1750", "noatime"];
    add_mount(&mut config, json!({"destination": "/scratch", "type": "tmpfs", "options": options}));
    let stdout = guest.run(&config).stdout;
    for option in ["nosuid", "nodev", "noexec", "noatime", "size=1024k", "mode=1750"] {
        assert!(stdout.contains(option), "{option} in {stdout}");
    }
    assert!(stdout.ends_with("1750\n"), "{stdout}");
}

#[test]
fn unknown_option_is_refused_in_the_kernels_words() {
    let mut guest = Guest::start();
    let mut config = shell("true");
    let mount = json!({"destination": "/scratch", "type": "tmpfs", "options": ["colour=red"]});
    let index = add_mount(&mut config, mount);
    let refusal = guest.fail(&config);
    assert_eq!(refusal.phase, FailurePhase::Mounts);
    assert!(refusal.message.starts_with(&format!("mounts[{index}] (/scratch): option colour")));
}

#[test]
fn tmpfs_can_begin_as_a_copy_of_what_it_hides() {
    let mut guest = Guest::start();
    let mut config = shell(
        "cat /data/a/file; readlink /data/link; stat -c '%u %a' /data/a/file; touch /data/new",
    );
    fs::create_dir_all(guest.rootfs().join("data/a")).expect("directory");
    let file = guest.rootfs().join("data/a/file");
    fs::write(&file, "copied\n").expect("file");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640)).expect("mode");
    std::os::unix::fs::chown(&file, Some(12), Some(34)).expect("owner");
    symlink("a/file", guest.rootfs().join("data/link")).expect("link");
    let mount = json!({"destination": "/data", "type": "tmpfs", "options": ["tmpcopyup"]});
    add_mount(&mut config, mount);
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "copied\na/file\n12 640\n", "{}", outcome.stderr);
    assert!(!guest.rootfs().join("data/new").exists());
}

#[test]
fn links_in_the_root_file_system_cannot_redirect_mounts() {
    let mut guest = Guest::start();
    let mut config = shell("cat /inner/hostile/x; ls /inner");
    fs::create_dir(guest.rootfs().join("inner")).expect("directory");
    symlink("../../../../../../inner", guest.rootfs().join("up")).expect("link");
    let mount = |destination: &str| json!({"destination": destination, "type": "tmpfs"});
    add_mount(&mut config, mount("/up/hostile"));
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "hostile\n");
    assert!(guest.rootfs().join("inner/hostile").is_dir());

    fs::remove_dir(guest.rootfs().join("proc")).expect("directory");
    fs::create_dir(guest.rootfs().join("fake")).expect("directory");
    symlink("fake", guest.rootfs().join("proc")).expect("link");
    let refusal = guest.fail(&shell("true"));
    assert_eq!(refusal.phase, FailurePhase::Mounts);
    assert!(refusal.message.contains("/proc"), "{}", refusal.message);
}

#[test]
fn default_and_configured_devices_work() {
    let mut guest = Guest::start();
    let mut config = shell(
        "for d in null zero full random urandom tty fuse-like; do stat -c '%n %t:%T %a %u' /dev/$d; done; \
         head -c 3 /dev/zero | wc -c; echo x > /dev/full || echo full; \
         readlink /dev/ptmx; readlink /dev/fd; readlink /dev/stdout; stat -c %F /dev/pipe",
    );
    config["linux"]["devices"] = json!([
        {"path": "/dev/fuse-like", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 9},
        {"path": "/dev/pipe", "type": "p", "major": 0, "minor": 0},
    ]);
    let stdout = guest.run(&config).stdout;
    let expected = [
        "/dev/null 1:3 666 0",
        "/dev/zero 1:5 666 0",
        "/dev/full 1:7 666 0",
        "/dev/random 1:8 666 0",
        "/dev/urandom 1:9 666 0",
        "/dev/tty 5:0 666 0",
        "/dev/fuse-like 1:5 640 9",
        "3",
        "full",
        "pts/ptmx",
        "/proc/self/fd",
        "/proc/self/fd/1",
        "fifo",
    ];
    assert_eq!(stdout.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn device_that_the_guest_does_not_have_is_refused_by_field() {
    let mut guest = Guest::start();
    let mut config = shell("true");
    config["linux"]["devices"] =
        json!([{"path": "/dev/gpu", "type": "c", "major": 4000, "minor": 1}]);
    let refusal = guest.fail(&config);
    assert_eq!(refusal.phase, FailurePhase::Config);
    assert!(refusal.message.starts_with("linux.devices[0]: \"/dev/gpu\""), "{}", refusal.message);
}

#[test]
fn propagation_of_the_root_is_the_configured_one() {
    let mut guest = Guest::start();
    for (word, is_shared) in [("shared", true), ("private", false)] {
        let mut config = shell("awk '$5 == \"/\"' /proc/self/mountinfo");
        config["linux"]["rootfsPropagation"] = json!(word);
        let line = guest.run(&config).stdout;
        assert_eq!(line.contains("shared:"), is_shared, "{word}: {line}");
    }
}

#[test]
fn container_without_a_dev_of_its_own_gets_its_devices_in_the_root() {
    let mut guest = Guest::start();
    let mut config = shell("echo x > /dev/null; stat -c %F /dev/null");
    config["mounts"] = json!([{"destination": "/proc", "type": "proc", "source": "proc"}]);
    let outcome = guest.run(&config);
    assert_eq!(outcome.stdout, "character special file\n", "{}", outcome.stderr);
    assert_eq!(outcome.status, ExitStatus::Code(0));
}
