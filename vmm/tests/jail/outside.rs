//! What the host sees of a jailed process.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::process::ExitStatusExt;

use kiln_vmm::config::JailConfig;
use kiln_vmm::jail::identity;
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::inmate::{CONTROL, Cell, Component, Inmate, KEPT};
use crate::trial;

/// A user of the host without privileges.
const NOBODY: u32 = 65534;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for component in Component::UNPRIVILEGED {
        let name = component.name();
        trials.push(trial(format!("{name}_is_what_the_table_says"), move || table(component)));
        trials.push(trial(format!("{name}_is_jailed_without_root"), move || rootless(component)));
    }
    trials.push(trial("fs_is_what_the_table_says", file_system_table));
    for component in Component::ALL {
        let name = component.name();
        // QEMU is put into its jail by its parent, who sees to that too.
        if !matches!(component, Component::Command | Component::Qemu) {
            trials.push(trial(format!("{name}_dies_with_its_parent"), move || orphan(component)));
        }
    }
    trials.push(trial("root_is_no_identity", || {
        let errors = refused(JailConfig { uid: 0, gid: 7 }, None);
        assert!(errors.contains("uid 0 and gid 7"), "{errors}");
    }));
    trials.push(trial("another_user_needs_root", || {
        let errors = refused(JailConfig { uid: 1000, gid: 1000 }, Some(NOBODY));
        assert!(errors.contains("CAP_SETUID"), "{errors}");
    }));
    trials.push(trial("a_dead_parent_is_noticed", || {
        let mut inmate = cell(Component::Vmm, identity::allocate().unwrap(), None).start();
        // Ends before the socket's other end could have been looked at, or while it is read.
        drop(inmate.control);
        let status = inmate.child.wait().unwrap();
        assert!(status.code().is_some(), "{status}");
    }));
    trials
}

fn cell(component: Component, identity: JailConfig, started_as: Option<u32>) -> Cell<'static> {
    Cell { component, identity, seccomp: true, task: "idle", started_as }
}

/// Starts an inmate and waits until it says that it is in its jail.
fn jailed(cell: &Cell<'_>) -> Inmate {
    let mut inmate = cell.start();
    let said = said(&inmate);
    if said != "jailed" {
        let errors = std::io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap();
        panic!("{said:?}: {errors}");
    }
    inmate
}

fn said(inmate: &Inmate) -> String {
    let mut packet = [0; 64];
    let length = nix::unistd::read(&inmate.control, &mut packet).unwrap();
    String::from_utf8(packet[..length].to_vec()).unwrap()
}

fn status(pid: u32, field: &str) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(&format!("{field}:")));
    line.unwrap().split_whitespace().collect::<Vec<_>>().join(" ")
}

fn namespace(pid: &str, kind: &str) -> String {
    fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap().to_string_lossy().into_owned()
}

fn check_privileges(pid: u32, id: u32) {
    assert_eq!(status(pid, "Uid"), format!("{id} {id} {id} {id}"));
    assert_eq!(status(pid, "Gid"), format!("{id} {id} {id} {id}"));
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        assert_eq!(status(pid, set), "0000000000000000", "{set}");
    }
    assert_eq!(status(pid, "NoNewPrivs"), "1");
    assert_eq!(status(pid, "Seccomp"), "2");
    assert_eq!(status(pid, "Seccomp_filters"), "1");
    for kind in ["mnt", "ipc", "uts", "cgroup"] {
        assert_ne!(namespace(&pid.to_string(), kind), namespace("self", kind), "{kind}");
    }
}

fn check_files(pid: u32) {
    let open: BTreeSet<i32> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
        .collect();
    assert_eq!(open, BTreeSet::from([0, 1, 2, CONTROL, KEPT]));
    assert_eq!(fs::read_dir(format!("/proc/{pid}/root/")).unwrap().count(), 0);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let options = mounts.split_whitespace().nth(5).unwrap();
    assert!(options.starts_with("ro,nosuid,nodev,noexec"), "{mounts}");
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let core = limits.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert_eq!(core.split_whitespace().skip(4).take(2).collect::<Vec<_>>(), ["0", "0"]);
}

fn table(component: Component) {
    let identity = identity::allocate().unwrap();
    let mut inmate = jailed(&cell(component, identity, None));
    let pid = inmate.child.id();
    check_privileges(pid, identity.uid);
    check_files(pid);
    assert_eq!(status(pid, "Groups"), "");
    let own_network = namespace(&pid.to_string(), "net") != namespace("self", "net");
    assert_eq!(own_network, component == Component::Devices);
    drop(inmate.control);
    assert!(inmate.child.wait().unwrap().success());
}

/// The capabilities for making files of any owner: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SETGID, SETUID,
/// MKNOD, SETFCAP.
const MAKE_FILES: &str = "00000000880000db";

fn file_system_table() {
    let mut inmate = jailed(&cell(Component::Fs, identity::allocate().unwrap(), None));
    let pid = inmate.child.id();
    for (set, expected) in [
        ("CapInh", "0000000000000000"),
        ("CapPrm", MAKE_FILES),
        ("CapEff", MAKE_FILES),
        ("CapBnd", MAKE_FILES),
        ("CapAmb", "0000000000000000"),
        ("NoNewPrivs", "1"),
        ("Seccomp", "2"),
    ] {
        assert_eq!(status(pid, set), expected, "{set}");
    }
    for kind in ["mnt", "ipc", "uts", "net"] {
        assert_ne!(namespace(&pid.to_string(), kind), namespace("self", kind), "{kind}");
    }
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    let places: BTreeSet<&str> =
        mounts.lines().map(|line| line.split_whitespace().nth(4).unwrap()).collect();
    assert_eq!(places, BTreeSet::from(["/", "/rootfs"]), "{mounts}");
    drop(inmate.control);
    assert!(inmate.child.wait().unwrap().success());
}

fn rootless(component: Component) {
    let identity = JailConfig { uid: NOBODY, gid: NOBODY };
    let mut inmate = jailed(&cell(component, identity, Some(NOBODY)));
    let pid = inmate.child.id();
    check_privileges(pid, NOBODY);
    check_files(pid);
    assert_ne!(namespace(&pid.to_string(), "user"), namespace("self", "user"));
    drop(inmate.control);
    assert!(inmate.child.wait().unwrap().success());
}

fn orphan(component: Component) {
    let identity = identity::allocate().unwrap();
    let task = Cell { task: "pair", ..cell(component, identity, None) };
    let mut parent = task.start();
    let words = [said(&parent), said(&parent)];
    assert!(words.contains(&"jailed".to_owned()), "{words:?}");

    kill(Pid::from_raw(parent.child.id() as i32), Signal::SIGKILL).unwrap();
    assert_eq!(parent.child.wait().unwrap().signal(), Some(libc::SIGKILL));
    // Both had the other end of the control socket, and no one else has: it closes when the second
    // is gone too, which has no other reason to end.
    assert_eq!(said(&parent), "");
}

fn refused(identity: JailConfig, started_as: Option<u32>) -> String {
    let mut inmate = cell(Component::Vmm, identity, started_as).start();
    let status = inmate.child.wait().unwrap();
    assert!(!status.success());
    std::io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap()
}
