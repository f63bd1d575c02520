//! The engines: KVM as far as the self-test, and QEMU.

use std::path::Path;
use std::process::{Command, Stdio};

use super::Check;
use crate::engine::device::{self, DeviceError};
use crate::engine::{KvmProblem, Memory, usable_kvm};
use crate::sandbox::machine::find_program;

const DEVICE: &str = "kvm device";
const API: &str = "kvm interface";
const SELF_TEST: &str = "kvm self-test";
const QEMU: &str = "qemu";

/// What QEMU must have for the emulated engine.
const QEMU_DEVICES: [&str; 2] = ["vhost-user-fs-device", "vhost-user-vsock-device"];

/// Checks KVM. Whether the kvm engine can be used.
pub fn kvm(checks: &mut Vec<Check>, memory: Memory) -> bool {
    let kvm = match device::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            let (explanation, mend) = split(&error);
            checks.push(Check::fail(DEVICE, explanation, mend));
            return false;
        }
    };
    checks.push(Check::ok(DEVICE, format!("{} opens for reading and writing", device::PATH)));

    match kiln_vmm::kvm::check_host(kvm.into()) {
        Ok(version) => {
            let explanation = format!("version {version}, with all that kiln needs of it");
            checks.push(Check::ok(API, explanation));
        }
        Err(error) => {
            let mend = "use a Linux host of version 5.10 or later with its own KVM";
            checks.push(Check::fail(API, error.to_string(), mend));
            return false;
        }
    }
    let check = self_test(usable_kvm(memory));
    let usable = check.status == super::Status::Ok;
    checks.push(check);
    usable
}

fn self_test(result: Result<u64, KvmProblem>) -> Check {
    match result {
        Ok(ring0_per_second) => Check::ok(
            SELF_TEST,
            format!(
                "this KVM runs Linux guests: user mode reaches the guest's kernel, which executes \
                 {} million instructions a second",
                ring0_per_second / 1_000_000
            ),
        ),
        Err(problem @ KvmProblem::CannotRunLinux(_)) => Check::fail(
            SELF_TEST,
            problem.to_string(),
            "use a host with VT-x or AMD-V, or a virtual machine with nested virtualisation; until \
             then the emulated engine serves development and tests",
        ),
        Err(problem) => Check::fail(
            SELF_TEST,
            problem.to_string(),
            "run `kiln --debug doctor --fresh` again; if it fails on an idle host too, report it \
             with its output",
        ),
    }
}

/// An error is told as what is wrong, a colon, and what to do, where something can be done.
fn split(error: &DeviceError) -> (String, String) {
    let text = error.to_string();
    match (error, text.split_once(": ")) {
        (DeviceError::Missing { .. } | DeviceError::Permission { .. }, Some((what, mend))) => {
            (what.to_owned(), mend.to_owned())
        }
        _ => (text, "see the kernel's log (dmesg)".to_owned()),
    }
}

/// Checks QEMU. Whether the emulated engine can be used; where kvm can, it needn't.
pub fn emulated(checks: &mut Vec<Check>, qemu: &Path, has_kvm: bool) -> bool {
    let lacking = if has_kvm { Check::warn } else { Check::fail };
    let Ok(program) = find_program(qemu) else {
        checks.push(lacking(
            QEMU,
            format!("{} is not there: the emulated engine can't be used", qemu.display()),
            "install qemu-system-x86, or name its executable with `qemu` in the configuration file"
                .to_owned(),
        ));
        return false;
    };
    let version = output(&program, &["--version"]);
    let machines = output(&program, &["-machine", "help"]);
    let devices = output(&program, &["-machine", "microvm", "-device", "help"]);
    let version = version.lines().next().unwrap_or("QEMU of an unknown version").to_owned();
    let missing = missing_parts(&machines, &devices);
    if !missing.is_empty() {
        checks.push(lacking(
            QEMU,
            format!("{version} lacks {}", missing.join(", ")),
            "install a QEMU of version 6 or later that is built with vhost-user".to_owned(),
        ));
        return false;
    }
    checks.push(Check::ok(
        QEMU,
        format!(
            "{version}: the emulated engine can be used, for development and tests; it is not a \
             security boundary"
        ),
    ));
    true
}

fn missing_parts(machines: &str, devices: &str) -> Vec<&'static str> {
    let mut missing = Vec::new();
    if !machines.lines().any(|line| line.starts_with("microvm ")) {
        missing.push("the microvm machine");
    }
    let has = |device: &str| devices.contains(&format!("\"{device}\""));
    missing.extend(QEMU_DEVICES.into_iter().filter(|device| !has(device)));
    missing
}

/// What a program prints; nothing if it can't be run.
fn output(program: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Status;

    #[test]
    fn what_qemu_lacks_is_named() {
        let machines = "Supported machines are:\nmicrovm              microvm (i386)\n";
        let devices = "name \"vhost-user-fs-device\", bus virtio-bus\n";
        assert_eq!(missing_parts(machines, devices), ["vhost-user-vsock-device"]);
        assert_eq!(missing_parts("", devices).len(), 2);
    }

    #[test]
    fn lack_of_qemu_is_worse_without_kvm() {
        for (has_kvm, status) in [(true, Status::Warn), (false, Status::Fail)] {
            let mut checks = Vec::new();
            assert!(!emulated(&mut checks, Path::new("/nonexistent/qemu"), has_kvm));
            assert_eq!(checks[0].status, status);
            assert!(checks[0].mend.as_deref().is_some_and(|mend| mend.contains("qemu-system-x86")));
        }
    }

    #[test]
    fn a_kvm_that_cannot_run_linux_is_explained() {
        let check = self_test(Err(KvmProblem::CannotRunLinux("SYSCALL is lost".to_owned())));
        assert_eq!(check.status, Status::Fail);
        assert!(check.explanation.contains("SYSCALL is lost"));
        assert!(check.mend.is_some_and(|mend| mend.contains("VT-x")));
        assert_eq!(self_test(Ok(2_000_000_000)).status, Status::Ok);
    }
}
