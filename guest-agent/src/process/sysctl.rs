//! Kernel parameters of the container's namespaces (`linux.sysctl`).
//!
//! As with runc only parameters that belong to a namespace can be set; the rest would be the guest's
//! own. They are written through a procfs that is mounted for this purpose alone and never attached,
//! so that nothing in the container's tree can stand in for it.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use kiln_protocol::FailurePhase;
use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::failure::{During, Failure};

/// Parameters by name, in the order in which they are written.
pub type Sysctls = BTreeMap<String, String>;

/// Parameters of the IPC namespace besides `fs.mqueue.*`.
const IPC: [&str; 8] = [
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "kernel.shm_rmid_forced",
];

/// Checks `linux.sysctl`.
///
/// # Errors
/// A parameter that belongs to no namespace, by name.
pub fn from_spec<'a>(
    sysctls: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<Sysctls, Failure> {
    let mut checked = Sysctls::new();
    for (name, value) in sysctls {
        let dotted = name.replace('/', ".");
        let namespaced = dotted.starts_with("net.")
            || dotted.starts_with("fs.mqueue.")
            || dotted == "kernel.domainname"
            || IPC.contains(&dotted.as_str());
        if !namespaced {
            return Err(Failure::config(format!(
                "linux.sysctl: {name:?} belongs to no namespace, so a container cannot have its own"
            )));
        }
        checked.insert(name.clone(), value.clone());
    }
    Ok(checked)
}

/// Writes the parameters through a mounted procfs.
///
/// # Errors
/// The first that can't be written, by name.
pub fn write(sysctls: &Sysctls, proc: BorrowedFd<'_>) -> Result<(), Failure> {
    for (name, value) in sysctls {
        write_one(name, value, proc)
            .during(FailurePhase::Process, || format!("linux.sysctl: {name:?}"))?;
    }
    Ok(())
}

fn write_one(name: &str, value: &str, proc: BorrowedFd<'_>) -> io::Result<()> {
    // A name with slashes may have dots inside its components (interfaces such as eth0.1).
    let path = if name.contains('/') { name.to_owned() } else { name.replace('.', "/") };
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let file = rustix::fs::openat2(proc, format!("sys/{path}"), flags, Mode::empty(), resolve)?;
    std::fs::File::from(file).write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str) -> Result<Sysctls, Failure> {
        from_spec([(&name.to_owned(), &"1".to_owned())])
    }

    #[test]
    fn only_namespaced_parameters_are_taken() {
        for name in [
            "net.ipv4.ip_forward",
            "net/ipv4/conf/eth0.1/forwarding",
            "kernel.sem",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            assert!(check(name).is_ok(), "{name}");
        }
        for name in ["vm.overcommit_memory", "kernel.panic", "fs.file-max", "kernel.hostname"] {
            assert!(check(name).expect_err("refused").message.contains(name));
        }
    }

    #[test]
    fn name_cannot_climb_out_of_the_parameters() {
        let proc = rustix::fs::open("/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let proc = proc.expect("/proc");
        let sysctls = Sysctls::from([("net/../../self/comm".to_owned(), "x".to_owned())]);
        assert!(write(&sysctls, std::os::fd::AsFd::as_fd(&proc)).is_err());
    }
}
