//! The jail of a program that isn't ours, with a shell in QEMU's place.

use std::os::unix::process::CommandExt;
use std::process::Command;

use kiln_vmm::jail::foreign::{Foreign, PROGRAM_PATHS};
use kiln_vmm::jail::{identity, sandbox_limits};
use libtest_mimic::Trial;

use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("foreign_program_is_nobody", || {
            let id = identity::allocate().unwrap().uid;
            let status = run("while read line; do echo $line; done < /proc/self/status");
            for expected in [
                format!("Uid: {id} {id} {id} {id}"),
                format!("Gid: {id} {id} {id} {id}"),
                "Groups:".into(),
                "CapEff: 0000000000000000".into(),
                "CapPrm: 0000000000000000".into(),
                "CapBnd: 0000000000000000".into(),
                "NoNewPrivs: 1".into(),
            ] {
                assert!(status.lines().any(|line| line == expected), "{expected}\n{status}");
            }
        }),
        trial("foreign_program_sees_programs_only", || {
            let mut expected: Vec<String> = PROGRAM_PATHS
                .iter()
                .filter(|path| std::path::Path::new(path).symlink_metadata().is_ok())
                .map(|path| path.split('/').nth(1).unwrap().to_owned())
                .collect();
            expected.push("proc".into());
            expected.sort();
            expected.dedup();
            let seen = run("for name in /* /.[!.]*; do echo ${name#/}; done");
            let seen: Vec<&str> = seen.lines().filter(|name| !name.contains('*')).collect();
            assert_eq!(seen, expected);
        }),
        trial("foreign_program_sees_no_other_process", || {
            let seen = run("for name in /proc/[0-9]*; do echo $name; done; echo /proc/$$");
            let (own, others) = (seen.lines().next_back().unwrap(), seen.lines().count() - 1);
            assert!(others >= 1 && seen.lines().take(others).any(|pid| pid == own), "{seen}");
            // Other tests' shells may have the same user, and so be seen.
            for pid in [1, std::process::id()] {
                assert!(!seen.lines().any(|seen| seen == format!("/proc/{pid}")), "{seen}");
            }
        }),
        trial("foreign_program_has_no_network", || {
            let interfaces = run("while read line; do echo $line; done < /proc/self/net/dev");
            assert_eq!(interfaces.lines().skip(2).count(), 1, "{interfaces}");
        }),
        trial("foreign_program_writes_nowhere", || {
            for path in ["/file", "/usr/file", "/etc/file", "/proc/self/oom_score_adj"] {
                assert_eq!(run(&format!("echo 1 2>&- > {path} && echo written")), "", "{path}");
            }
        }),
        trial("foreign_program_kills_no_one", || {
            let parent = std::process::id();
            assert_eq!(run(&format!("kill -0 {parent} 2>&- && echo done")), "");
            assert_eq!(run("kill -0 1 2>&- && echo done"), "");
        }),
    ]
}

fn run(script: &str) -> String {
    let identity = identity::allocate().unwrap();
    let paths = PROGRAM_PATHS.iter().copied();
    let jail = Foreign::plan(identity, sandbox_limits(), paths).unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", script]).env_clear();
    // SAFETY: a planned jail makes system calls only.
    unsafe { command.pre_exec(move || jail.enter()) };
    let output = command.output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}
