//! What someone who has taken a component over would try, and that each attempt fails.

use std::fs::File;
use std::io::{self, Read};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::ExitStatusExt;
use std::ptr;
use std::sync::OnceLock;

use kiln_vmm::jail::identity;
use kiln_vmm::jail::seccomp::violation;
use libtest_mimic::Trial;

use crate::inmate::{Cell, Component, Inmate, REFUSED};
use crate::trial;

struct Attack {
    name: &'static str,
    attempt: fn() -> io::Result<()>,
    /// The system call that seccomp stops it at.
    call: &'static str,
    /// Whether something else would stop it too, were there no seccomp.
    refused_otherwise: bool,
}

const fn attack(name: &'static str, call: &'static str, attempt: fn() -> io::Result<()>) -> Attack {
    Attack { name, attempt, call, refused_otherwise: true }
}

/// An attack that only seccomp stops: the call by itself harms no one, but it is a large surface
/// of the kernel, or the first step of something worse.
const fn surface(
    name: &'static str,
    call: &'static str,
    attempt: fn() -> io::Result<()>,
) -> Attack {
    Attack { name, attempt, call, refused_otherwise: false }
}

const ATTACKS: &[Attack] = &[
    attack("open_host_file", "openat", || File::open("/etc/passwd").map(drop)),
    attack("open_proc", "openat", || File::open("/proc/1/status").map(drop)),
    attack("create_file", "openat", || File::create("/created").map(drop)),
    attack("list_root_of_root", "openat", || std::fs::read_dir("/..").and_then(not_empty)),
    attack("open_by_handle", "open_by_handle_at", open_by_handle),
    attack("connect_out", "socket", connect_out),
    surface("socket_inet", "socket", || raw(libc::SYS_socket, [2, 1, 0, 0, 0])),
    surface("socket_netlink", "socket", || raw(libc::SYS_socket, [16, 3, 0, 0, 0])),
    attack("ptrace_parent", "ptrace", || {
        raw(libc::SYS_ptrace, [i64::from(libc::PTRACE_ATTACH), parent(), 0, 0, 0])
    }),
    attack("read_memory_of_parent", "process_vm_readv", read_memory_of_parent),
    attack("kill_parent", "kill", || raw(libc::SYS_kill, [parent(), 0, 0, 0, 0])),
    attack("kill_init", "kill", || raw(libc::SYS_kill, [1, 0, 0, 0, 0])),
    // By itself it reports success even where it reached nobody.
    surface("kill_everyone_else", "kill", || raw(libc::SYS_kill, [-1, 0, 0, 0, 0])),
    attack("signal_thread_of_parent", "tgkill", || {
        raw(libc::SYS_tgkill, [parent(), parent(), 0, 0, 0])
    }),
    attack("mount", "mount", mount_tmpfs),
    attack("new_mount_api", "fsopen", || {
        raw(libc::SYS_fsopen, [c"tmpfs".as_ptr() as i64, 0, 0, 0, 0])
    }),
    attack("pivot_root", "pivot_root", || {
        raw(libc::SYS_pivot_root, [c".".as_ptr() as i64, c".".as_ptr() as i64, 0, 0, 0])
    }),
    attack("chroot", "chroot", || raw(libc::SYS_chroot, [c"/".as_ptr() as i64, 0, 0, 0, 0])),
    attack("unshare_mount", "unshare", || {
        raw(libc::SYS_unshare, [i64::from(libc::CLONE_NEWNS), 0, 0, 0, 0])
    }),
    surface("unshare_user", "unshare", || {
        raw(libc::SYS_unshare, [i64::from(libc::CLONE_NEWUSER), 0, 0, 0, 0])
    }),
    attack("setuid_root", "setuid", || raw(libc::SYS_setuid, [0; 5])),
    attack("setresgid_root", "setresgid", || raw(libc::SYS_setresgid, [0; 5])),
    attack("setgroups", "setgroups", || raw(libc::SYS_setgroups, [0; 5])),
    attack("capset_all", "capset", raise_capabilities),
    attack("execute_program", "execve", || {
        raw(libc::SYS_execve, [c"/bin/sh".as_ptr() as i64, 0, 0, 0, 0])
    }),
    surface("execute_memory_file", "execveat", execute_memory_file),
    surface("fork", "fork", || raw(libc::SYS_fork, [0; 5])),
    surface("clone_process", "clone", || {
        raw(libc::SYS_clone, [i64::from(libc::SIGCHLD), 0, 0, 0, 0])
    }),
    attack("writable_and_executable_memory", "mmap", || map(libc::PROT_WRITE | libc::PROT_EXEC)),
    attack("memory_made_executable", "mprotect", make_executable),
    surface("keyctl", "keyctl", || raw(libc::SYS_keyctl, [0, -3, 0, 0, 0])),
    surface("add_key", "add_key", add_key),
    surface("io_uring", "io_uring_setup", io_uring),
    attack("bpf", "bpf", || raw(libc::SYS_bpf, [0, ptr::null::<u8>() as i64, 0, 0, 0])),
    surface("userfaultfd", "userfaultfd", || raw(libc::SYS_userfaultfd, [1, 0, 0, 0, 0])),
    attack("perf_event_open", "perf_event_open", perf_of_everyone),
    attack("load_module", "init_module", || {
        raw(libc::SYS_init_module, [0, 0, c"".as_ptr() as i64, 0, 0])
    }),
    attack("reboot", "reboot", || raw(libc::SYS_reboot, [0; 5])),
    attack("set_hostname", "sethostname", || {
        raw(libc::SYS_sethostname, [c"x".as_ptr() as i64, 1, 0, 0, 0])
    }),
    attack("kernel_log", "syslog", || raw(libc::SYS_syslog, [5, 0, 0, 0, 0])),
    attack("raise_limits", "prlimit64", raise_core_limit),
    surface("become_dumpable", "prctl", || {
        raw(libc::SYS_prctl, [i64::from(libc::PR_SET_DUMPABLE), 1, 0, 0, 0])
    }),
    surface("new_sigsys_action", "rt_sigaction", || {
        raw(libc::SYS_rt_sigaction, [i64::from(libc::SIGSYS), 0, 0, 8, 0])
    }),
    surface("io_control_of_terminals", "ioctl", || {
        let byte = b'x';
        raw(libc::SYS_ioctl, [2, libc::TIOCSTI as i64, &raw const byte as i64, 0, 0])
    }),
];

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for component in Component::ALL {
        for attack in ATTACKS {
            let name = format!("{}_{}", component.name(), attack.name);
            trials.push(trial(format!("{name}_ends_it"), move || is_ended(component, attack)));
            if attack.refused_otherwise {
                trials.push(trial(format!("{name}_is_refused_without_seccomp"), move || {
                    is_refused(component, attack);
                }));
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
        Component::Vmm | Component::Devices => violation::EXIT_STATUS,
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

fn is_refused(component: Component, attack: &Attack) {
    let mut inmate = start(component, attack, false);
    let status = inmate.child.wait().unwrap();
    let errors = io::read_to_string(inmate.child.stderr.take().unwrap()).unwrap();
    assert_eq!(status.code(), Some(REFUSED.into()), "{status} {:?}: {errors}", status.signal());
}

/// A port of this machine's loopback interface on which the test process listens.
pub fn listener_port() -> u16 {
    static LISTENER: OnceLock<TcpListener> = OnceLock::new();
    let listener = LISTENER.get_or_init(|| TcpListener::bind(("127.0.0.1", 0)).unwrap());
    listener.local_addr().unwrap().port()
}

fn connect_out() -> io::Result<()> {
    let port = std::env::var("LISTENER").unwrap().parse().unwrap();
    let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)))?;
    stream.read(&mut []).map(drop)
}

fn raw(call: libc::c_long, arguments: [i64; 5]) -> io::Result<()> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: attacks pass numbers and pointers to what lives as long as the call.
    match unsafe { libc::syscall(call, a, b, c, d, e, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// The test process: the inmate's parent.
fn parent() -> i64 {
    std::env::var("PARENT").unwrap().parse().unwrap()
}

fn not_empty(mut directory: std::fs::ReadDir) -> io::Result<()> {
    match directory.next() {
        Some(_) => Ok(()),
        None => Err(io::ErrorKind::NotFound.into()),
    }
}

fn open_by_handle() -> io::Result<()> {
    // A handle of 8 bytes, type 1 (inode and generation), inode 2: the root of ext4.
    let handle: [u32; 4] = [8, 1, 2, 0];
    raw(libc::SYS_open_by_handle_at, [4, &raw const handle as i64, 0, 0, 0])
}

fn read_memory_of_parent() -> io::Result<()> {
    let mut byte = 0u8;
    let local = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let remote = libc::iovec { iov_base: 0x40_0000 as *mut _, iov_len: 1 };
    let (local, remote) = (&raw const local as i64, &raw const remote as i64);
    raw(libc::SYS_process_vm_readv, [parent(), local, 1, remote, 1])
}

fn mount_tmpfs() -> io::Result<()> {
    let (kind, at) = (c"tmpfs".as_ptr() as i64, c"/".as_ptr() as i64);
    raw(libc::SYS_mount, [kind, at, kind, 0, 0])
}

fn raise_capabilities() -> io::Result<()> {
    let header: [u32; 2] = [0x2008_0522, 0];
    let all: [u32; 6] = [u32::MAX; 6];
    raw(libc::SYS_capset, [&raw const header as i64, &raw const all as i64, 0, 0, 0])
}

fn execute_memory_file() -> io::Result<()> {
    let empty = c"".as_ptr() as i64;
    raw(libc::SYS_execveat, [4, empty, 0, 0, i64::from(libc::AT_EMPTY_PATH)])
}

fn map(protection: i32) -> io::Result<()> {
    // SAFETY: a new mapping that nobody uses.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ | protection, flags, -1, 0)
    };
    if mapped == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn make_executable() -> io::Result<()> {
    // SAFETY: a new mapping that nobody else uses.
    let mapped = unsafe {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        libc::mmap(ptr::null_mut(), 4096, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0)
    };
    raw(libc::SYS_mprotect, [mapped as i64, 4096, 5, 0, 0])
}

fn add_key() -> io::Result<()> {
    let (kind, name) = (c"user".as_ptr() as i64, c"kiln-test".as_ptr() as i64);
    raw(libc::SYS_add_key, [kind, name, name, 4, -1])
}

fn io_uring() -> io::Result<()> {
    let mut parameters = [0u8; 120];
    raw(libc::SYS_io_uring_setup, [1, parameters.as_mut_ptr() as i64, 0, 0, 0])
}

fn perf_of_everyone() -> io::Result<()> {
    // PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK, on all of CPU 0.
    let mut attributes = [0u32; 32];
    attributes[0] = 1;
    attributes[1] = 128;
    raw(libc::SYS_perf_event_open, [attributes.as_ptr() as i64, -1, 0, -1, 0])
}

fn raise_core_limit() -> io::Result<()> {
    let limit = [u64::MAX; 2];
    raw(libc::SYS_prlimit64, [0, 4, limit.as_ptr() as i64, 0, 0])
}
