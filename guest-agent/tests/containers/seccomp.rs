//! Seccomp profiles, by what real programs make of them.

use kiln_protocol::{ExitStatus, FailurePhase};
use serde_json::{Value, json};

use crate::guest::{Guest, shell};

fn with_profile(script: &str, profile: Value) -> Value {
    let mut config = shell(script);
    config["linux"]["seccomp"] = profile;
    config
}

#[test]
fn several_actions_and_errnos_stand_side_by_side() {
    let mut guest = Guest::start();
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["mkdir", "mkdirat", "no_such_call"], "action": "SCMP_ACT_ERRNO",
             "errnoRet": libc::ENOSPC},
            {"names": ["chmod", "fchmodat", "fchmodat2"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["chroot"], "action": "SCMP_ACT_KILL_PROCESS"},
            {"names": ["sethostname"], "action": "SCMP_ACT_LOG"},
        ],
    });
    let script = "mkdir /x; chmod 600 /etc/passwd; chroot / /bin/true; echo $?";
    let outcome = guest.run(&with_profile(script, profile));
    assert!(outcome.stderr.contains("No space left on device"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("Operation not permitted"), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "159\n", "SIGSYS is 31");
}

#[test]
fn conditions_look_at_arguments() {
    let mut guest = Guest::start();
    let args = |value: i32| json!([{"index": 1, "value": value, "op": "SCMP_CMP_EQ"}]);
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::ENOTTY,
             "args": args(libc::SIGUSR1)},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": libc::EXDEV,
             "args": args(libc::SIGUSR2)},
        ],
    });
    let script = "kill -USR1 $$; kill -USR2 $$; kill -0 $$ && echo allowed";
    let outcome = guest.run(&with_profile(script, profile));
    assert!(outcome.stderr.contains("Inappropriate ioctl"), "{}", outcome.stderr);
    assert!(outcome.stderr.to_lowercase().contains("cross-device"), "{}", outcome.stderr);
    assert_eq!(outcome.stdout, "allowed\n");
}

/// What busybox's shell needs to print a word, and nothing more.
const NEEDED: [&str; 34] = [
    "execve",
    "brk",
    "arch_prctl",
    "set_tid_address",
    "set_robust_list",
    "rseq",
    "prlimit64",
    "readlinkat",
    "getrandom",
    "mprotect",
    "mmap",
    "munmap",
    "prctl",
    "getuid",
    "getpid",
    "rt_sigaction",
    "rt_sigprocmask",
    "getppid",
    "uname",
    "write",
    "writev",
    "exit",
    "exit_group",
    "getgid",
    "geteuid",
    "getegid",
    "ioctl",
    "stat",
    "newfstatat",
    "fcntl",
    "dup2",
    "rt_sigreturn",
    "getcwd",
    "readlink",
];

#[test]
fn allow_list_without_the_calls_of_the_agent_is_enough() {
    let mut guest = Guest::start();
    for no_new_privileges in [true, false] {
        let mut names = NEEDED.to_vec();
        if !no_new_privileges {
            // The filter goes in before the last capability is dropped.
            names.push("capset");
        }
        let profile = json!({
            "defaultAction": "SCMP_ACT_KILL_PROCESS",
            "syscalls": [{"names": names, "action": "SCMP_ACT_ALLOW"}],
        });
        let mut config = with_profile("echo printed", profile);
        config["process"]["noNewPrivileges"] = json!(no_new_privileges);
        let outcome = guest.run(&config);
        assert_eq!(outcome.status, ExitStatus::Code(0), "{no_new_privileges}");
        assert_eq!(outcome.stdout, "printed\n");
    }
}

#[test]
fn capability_for_the_filter_does_not_reach_the_program() {
    let mut guest = Guest::start();
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_ERRNO"}]});
    let mut config = with_profile("cat /proc/self/status | grep -E 'Cap|Seccomp:|NoNew'", profile);
    config["process"]["noNewPrivileges"] = json!(false);
    config["process"]["user"] = json!({"uid": 1000, "gid": 1000});
    let outcome = guest.run(&config);
    for line in ["NoNewPrivs:\t0", "Seccomp:\t2", "CapPrm:\t0000000000000000"] {
        assert!(outcome.stdout.contains(line), "{}", outcome.stdout);
    }
}

#[test]
fn calls_newer_than_the_profile_do_not_exist() {
    let mut guest = Guest::start();
    // Everything up to mkdirat (258) is named or denied; newer calls are answered with ENOSYS, so
    // that busybox's libc falls back to older ones and the step runs.
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}],
    });
    let outcome = guest.run(&with_profile("mkdir /x", profile));
    assert!(outcome.stderr.contains("Function not implemented"), "{}", outcome.stderr);
}

#[test]
fn profile_that_notifies_or_has_a_bad_argument_is_refused() {
    let mut guest = Guest::start();
    let refused = [
        (json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/x"}), "listenerPath"),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_NOTIFY"}]}),
            "syscalls[0]",
        ),
        (
            json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
            {"names": ["read"], "action": "SCMP_ACT_KILL",
             "args": [{"index": 6, "value": 1, "op": "SCMP_CMP_EQ"}]}]}),
            "syscalls[0].args",
        ),
        (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 5000}), "defaultAction"),
    ];
    for (profile, field) in refused {
        let refusal = guest.fail(&with_profile("true", profile));
        assert_eq!(refusal.phase, FailurePhase::Config);
        assert!(refusal.message.contains(&format!("linux.seccomp.{field}")), "{}", refusal.message);
    }
}
