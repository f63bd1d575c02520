//! What someone who has taken a component over would try, and that each attempt fails.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use kiln_vmm::jail::identity;
use kiln_vmm::jail::seccomp::violation;
use libtest_mimic::Trial;

use crate::attempts::*;
use crate::inmate::{Cell, Component, Inmate, REFUSED};
use crate::trial;

struct Attack {
    name: &'static str,
    /// As the documentation has it.
    what: &'static str,
    attempt: fn() -> io::Result<()>,
    /// The system call that seccomp stops it at.
    call: &'static str,
    /// Whether something else would stop it too, were there no seccomp.
    refused_otherwise: bool,
    fs: Fs,
    qemu: Qemu,
}

/// What stops an attack of `kiln fs`.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fs {
    /// What stops that of the others.
    Same,
    /// An error: it may make the call.
    Refused,
    /// Nothing need: it is what the process is for.
    Trade,
}

/// What stops an attack of QEMU.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Qemu {
    /// An error.
    Refused,
    /// Only QEMU's own filter, which isn't there in a test, or nothing.
    Open,
}

const fn attack(
    name: &'static str,
    what: &'static str,
    call: &'static str,
    attempt: fn() -> io::Result<()>,
) -> Attack {
    let (fs, qemu) = (Fs::Same, Qemu::Refused);
    Attack { name, what, attempt, call, refused_otherwise: true, fs, qemu }
}

/// An attack that only seccomp stops: the call by itself harms no one, but it is a large surface
/// of the kernel, or the first step of something worse.
const fn surface(
    name: &'static str,
    what: &'static str,
    call: &'static str,
    attempt: fn() -> io::Result<()>,
) -> Attack {
    Attack { refused_otherwise: false, ..attack(name, what, call, attempt) }
}

impl Attack {
    const fn fs(self, fs: Fs) -> Self {
        Self { fs, ..self }
    }

    const fn qemu(self, qemu: Qemu) -> Self {
        Self { qemu, ..self }
    }

    /// What is to become of it in a component's place, if it is tried there.
    fn ending(&self, component: Component) -> Option<Ending> {
        match component {
            Component::Vmm | Component::Devices | Component::Command => Some(Ending::Violation),
            Component::Fs => match self.fs {
                Fs::Same => Some(Ending::Violation),
                Fs::Refused => Some(Ending::Refusal),
                Fs::Trade => None,
            },
            Component::Qemu => match self.qemu {
                Qemu::Refused => Some(Ending::Refusal),
                Qemu::Open => None,
            },
        }
    }
}

/// How an attack ends.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// With the process, which says what it was.
    Violation,
    /// With an error.
    Refusal,
}

const ATTACKS: &[Attack] = &[
    attack("open_host_file", "open a file of the host", "openat", || {
        File::open("/etc/passwd").map(drop)
    })
    .fs(Fs::Refused),
    attack("open_proc", "look at another process in `/proc`", "openat", || {
        File::open("/proc/1/status").map(drop)
    })
    .fs(Fs::Refused),
    attack("climb_out", "climb out of the root", "openat", || {
        fs::read_dir("/../../root").map(drop)
    })
    .fs(Fs::Refused),
    attack("follow_link", "follow a link that leads out of the share", "openat", || {
        File::open("/rootfs/link").map(drop)
    })
    .fs(Fs::Refused),
    attack("create_file", "create a file", "openat", || File::create("/created").map(drop))
        .fs(Fs::Refused),
    attack("fill_disk", "fill a disk other than what is shared", "openat", fill_disk)
        .fs(Fs::Refused),
    attack("open_device", "make a device and open it", "mknodat", open_device).fs(Fs::Refused),
    attack("open_by_handle", "open a file by its handle", "open_by_handle_at", open_by_handle),
    attack("connect_out", "connect to a TCP port of the host", "socket", connect_out),
    attack("abstract_socket", "connect to an abstract socket of the host", "socket", connect_near),
    surface(
        "datagram_pair",
        "make a pair of sockets that can send to others",
        "socketpair",
        || UnixDatagram::pair().map(drop),
    )
    .qemu(Qemu::Open),
    surface("socket_inet", "make a network socket", "socket", || {
        raw(libc::SYS_socket, [2, 1, 0, 0, 0])
    }),
    surface("socket_netlink", "make a netlink socket", "socket", || {
        raw(libc::SYS_socket, [16, 3, 0, 0, 0])
    }),
    attack("ptrace_parent", "trace the parent", "ptrace", || {
        raw(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), parent(), 0, 0, 0])
    }),
    attack(
        "read_memory_of_parent",
        "read the parent's memory",
        "process_vm_readv",
        read_memory_of_parent,
    ),
    attack("take_descriptor", "take a descriptor of the parent's", "pidfd_open", take_descriptor),
    attack("kill_parent", "signal the parent", "kill", || {
        raw(libc::SYS_kill, [parent(), 0, 0, 0, 0])
    }),
    attack("kill_init", "signal init", "kill", || raw(libc::SYS_kill, [1, 0, 0, 0, 0])),
    // By itself it reports success even where it reached nobody.
    surface("kill_everyone_else", "signal everyone", "kill", || {
        raw(libc::SYS_kill, [-1, 0, 0, 0, 0])
    })
    .qemu(Qemu::Open),
    attack("signal_thread_of_parent", "signal a thread of the parent", "tgkill", || {
        raw(libc::SYS_tgkill, [parent(), parent(), 0, 0, 0])
    }),
    attack("mount", "mount", "mount", mount_tmpfs),
    attack("new_mount_api", "mount by the new calls", "fsopen", || {
        raw(libc::SYS_fsopen, [c"tmpfs".as_ptr() as i64, 0, 0, 0, 0])
    }),
    attack("pivot_root", "`pivot_root`", "pivot_root", || {
        raw(libc::SYS_pivot_root, [c".".as_ptr() as i64, c".".as_ptr() as i64, 0, 0, 0])
    }),
    attack("chroot", "`chroot`", "chroot", || {
        raw(libc::SYS_chroot, [c"/".as_ptr() as i64, 0, 0, 0, 0])
    }),
    attack("unshare_mount", "leave the mount namespace", "unshare", || {
        raw(libc::SYS_unshare, [i64::from(libc::CLONE_NEWNS), 0, 0, 0, 0])
    }),
    surface("unshare_user", "make a user namespace", "unshare", || {
        raw(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0])
    }),
    surface("clone_user", "make a user namespace with a process", "clone", || {
        let flags = i64::from(libc::CLONE_NEWUSER | libc::SIGCHLD);
        raw(libc::SYS_clone, [flags, 0, 0, 0, 0])
    }),
    attack("setuid_root", "become root", "setuid", || raw(libc::SYS_setuid, [0; 5])).fs(Fs::Trade),
    attack("setresgid_root", "take root's group", "setresgid", || raw(libc::SYS_setresgid, [0; 5]))
        .fs(Fs::Trade),
    attack("setgroups", "take other groups", "setgroups", || raw(libc::SYS_setgroups, [0; 5]))
        .fs(Fs::Trade),
    attack("capset_all", "raise capabilities", "capset", raise_capabilities).fs(Fs::Refused),
    attack("execute_program", "execute a program", "execve", || {
        raw(libc::SYS_execve, [c"/bin/sh".as_ptr() as i64, 0, 0, 0, 0])
    })
    .qemu(Qemu::Open),
    surface("execute_memory_file", "execute a memory file", "execveat", execute_memory_file)
        .qemu(Qemu::Open),
    surface("fork", "fork", "fork", || raw(libc::SYS_fork, [0; 5])).qemu(Qemu::Open),
    surface("clone_process", "clone a process", "clone", || {
        raw(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0, 0])
    })
    .qemu(Qemu::Open),
    attack("writable_and_executable_memory", "map executable memory", "mmap", || {
        map(libc::PROT_WRITE | libc::PROT_EXEC)
    })
    .qemu(Qemu::Open),
    attack("memory_made_executable", "make memory executable", "mprotect", make_executable)
        .qemu(Qemu::Open),
    surface("keyctl", "use keys", "keyctl", || raw(libc::SYS_keyctl, [0, -3, 0, 0, 0])),
    surface("add_key", "load a key", "add_key", add_key),
    surface("io_uring", "use io_uring", "io_uring_setup", io_uring),
    attack("bpf", "use BPF", "bpf", || {
        raw(libc::SYS_bpf, [0, std::ptr::null::<u8>() as i64, 0, 0, 0])
    }),
    surface("userfaultfd", "use userfaultfd", "userfaultfd", || {
        raw(libc::SYS_userfaultfd, [1, 0, 0, 0, 0])
    }),
    attack(
        "perf_event_open",
        "measure a processor of the host",
        "perf_event_open",
        perf_of_everyone,
    ),
    attack("load_module", "load a kernel module", "init_module", || {
        raw(libc::SYS_init_module, [0, 0, c"".as_ptr() as i64, 0, 0])
    }),
    attack("reboot", "reboot", "reboot", || raw(libc::SYS_reboot, [0; 5])),
    attack("set_hostname", "change the host's name", "sethostname", || {
        raw(libc::SYS_sethostname, [c"x".as_ptr() as i64, 1, 0, 0, 0])
    }),
    attack("set_clock", "set the host's clock", "clock_settime", set_clock),
    attack("io_ports", "reach I/O ports", "iopl", || raw(libc::SYS_iopl, [3, 0, 0, 0, 0])),
    attack("kernel_log", "read the kernel's log", "syslog", || {
        raw(libc::SYS_syslog, [5, 0, 0, 0, 0])
    }),
    attack("raise_limits", "raise its limits", "prlimit64", raise_core_limit),
    surface("become_dumpable", "become dumpable", "prctl", || {
        raw(libc::SYS_prctl, [i64::from(libc::PR_SET_DUMPABLE), 1, 0, 0, 0])
    })
    .qemu(Qemu::Open),
    surface("new_sigsys_action", "replace the handler of `SIGSYS`", "rt_sigaction", || {
        raw(libc::SYS_rt_sigaction, [i64::from(libc::SIGSYS), 0, 0, 8, 0])
    })
    .qemu(Qemu::Open),
    surface("io_control_of_terminals", "type into a terminal", "ioctl", || {
        let byte = b'x';
        raw(libc::SYS_ioctl, [2, libc::TIOCSTI as i64, &raw const byte as i64, 0, 0])
    }),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = vec![trial("documentation_has_every_attack", documentation)];
    for component in Component::ALL {
        for attack in ATTACKS {
            let name = format!("{}_{}", component.name(), attack.name);
            match attack.ending(component) {
                Some(Ending::Violation) => {
                    let ended = format!("{name}_ends_it");
                    trials.push(trial(ended, move || is_ended(component, attack)));
                    if attack.refused_otherwise {
                        trials.push(trial(
                            format!("{name}_is_refused_without_seccomp"),
                            move || {
                                is_refused(component, attack, false);
                            },
                        ));
                    }
                }
                Some(Ending::Refusal) => {
                    let refused = format!("{name}_is_refused");
                    trials.push(trial(refused, move || is_refused(component, attack, true)));
                }
                None => {}
            }
        }
    }
    trials
}

/// Runs one attack; in the jailed process.
pub fn attempt(name: &str) -> io::Result<()> {
    let attack = ATTACKS.iter().find(|attack| attack.name == name).unwrap();
    (attack.attempt)()
}

/// The table of `docs/jail.md` is that of the attacks.
fn documentation() {
    let mut table = String::new();
    for attack in ATTACKS {
        let otherwise = if attack.refused_otherwise { ", refused" } else { "" };
        let violation = format!("`{}`{otherwise}", attack.call);
        let fs = match attack.fs {
            Fs::Same => violation.clone(),
            Fs::Refused => "refused".to_owned(),
            Fs::Trade => "its trade".to_owned(),
        };
        let qemu = match attack.qemu {
            Qemu::Refused => "refused",
            Qemu::Open => "not tried",
        };
        writeln!(table, "| {} | {violation} | {fs} | {qemu} |", attack.what).unwrap();
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/jail.md");
    let text = fs::read_to_string(path).unwrap();
    assert!(text.contains(&table), "docs/jail.md should have these rows:\n{table}");
}

fn start(component: Component, attack: &Attack, seccomp: bool) -> Inmate {
    let identity = identity::allocate().unwrap();
    Cell { component, identity, seccomp, task: attack.name, started_as: None }.start()
}

fn is_ended(component: Component, attack: &Attack) {
    let mut inmate = start(component, attack, true);
    let status = inmate.child.wait().unwrap();
    let errors = io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap();
    let expected_status = match component {
        Component::Command => violation::COMMAND_EXIT_STATUS,
        _ => violation::EXIT_STATUS,
    };
    assert_eq!(status.code(), Some(expected_status), "{status}: {errors}");
    let expected = format!(
        "the {} process made a system call that its jail forbids: {} (number ",
        component.role(),
        attack.call
    );
    assert!(errors.contains(&expected), "{errors}");
    if component == Component::Command {
        return;
    }

    let mut packet = vec![0; 4096];
    let length = nix::unistd::read(&inmate.control, &mut packet).unwrap();
    let event: kiln_vmm::config::VmmEvent = serde_json::from_slice(&packet[..length]).unwrap();
    let kiln_vmm::config::VmmEvent::Failed { message } = event else { panic!("{event:?}") };
    assert!(message.starts_with(&expected), "{message}");
}

fn is_refused(component: Component, attack: &Attack, seccomp: bool) {
    let mut inmate = start(component, attack, seccomp);
    let status = inmate.child.wait().unwrap();
    let errors = io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap();
    assert_eq!(status.code(), Some(REFUSED.into()), "{status} {:?}: {errors}", status.signal());
}
