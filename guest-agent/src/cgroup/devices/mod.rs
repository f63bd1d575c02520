//! `linux.resources.devices`: which devices a container's processes may make nodes of and open.
//!
//! The rules are compiled into a program ([`program`]) that the kernel runs each time when a process
//! of the cgroup opens a device or makes a node ([`attach`]; kernel: `security/device_cgroup.c`). The
//! numbers are those of the guest's own drivers: its kernel's log and console, its disks. What a step's
//! file permissions say makes no difference.
//!
//! * What no rule speaks of is refused. A configuration without rules has the default ones.
//! * Of several rules that speak of the same access to the same device, the last one holds. Each of
//!   reading, writing and making a node is decided by itself: who may only read and opens for reading
//!   and writing is refused.
//! * The default devices, terminals, and making a node of any number are always allowed, as runc does:
//!   a node that can't be opened is harmless.
//! * The rules stay for as long as the container: `kiln update` doesn't change them. A container that
//!   makes cgroups of its own can add rules there and take nothing away.

mod attach;
mod program;

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

pub use program::Program;

use crate::failure::Failure;

/// Accesses to a device: a set of the kernel's `BPF_DEVCG_ACC_*` bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access(u8);

impl Access {
    /// Making a node.
    const MKNOD: Self = Self(1);
    /// Everything.
    const ALL: Self = Self(1 | 2 | 4);

    /// Reads some of the letters `r`, `w` and `m`.
    fn from_letters(letters: &str) -> Option<Self> {
        letters.chars().try_fold(Self(0), |access, letter| {
            let bit = match letter {
                'm' => 1,
                'r' => 2,
                'w' => 4,
                _ => return None,
            };
            Some(Self(access.0 | bit))
        })
    }
}

/// A device's type: the kernel's `BPF_DEVCG_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// A block device.
    Block = 1,
    /// A character device.
    Character = 2,
}

/// One entry of the list. What is `None` matches everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    device: Option<Type>,
    major: Option<u32>,
    minor: Option<u32>,
    access: Access,
}

impl Rule {
    const fn always(device: Type, number: Option<(u32, Option<u32>)>, access: Access) -> Self {
        let (major, minor) = match number {
            Some((major, minor)) => (Some(major), minor),
            None => (None, None),
        };
        Self { allow: true, device: Some(device), major, minor, access }
    }
}

/// What every container may do.
const ALWAYS: [Rule; 10] = {
    const fn character(major: u32, minor: Option<u32>) -> Rule {
        Rule::always(Type::Character, Some((major, minor)), Access::ALL)
    }
    [
        Rule::always(Type::Character, None, Access::MKNOD),
        Rule::always(Type::Block, None, Access::MKNOD),
        character(1, Some(3)), // null
        character(1, Some(5)), // zero
        character(1, Some(7)), // full
        character(1, Some(8)), // random
        character(1, Some(9)), // urandom
        character(5, Some(0)), // tty
        character(5, Some(2)), // ptmx
        character(136, None),  // pts/*
    ]
};

/// Whether a list lets a container use every device there is, as a privileged one's does: its last rule
/// does.
pub fn allow_all(devices: &[LinuxDeviceCgroup]) -> bool {
    const EVERYTHING: Rule =
        Rule { allow: true, device: None, major: None, minor: None, access: Access::ALL };
    devices.last().is_some_and(|last| from_spec(last).is_ok_and(|rule| rule == EVERYTHING))
}

/// Reads the list of a configuration and compiles it.
///
/// # Errors
/// A rule that names no access, or a type or number that there isn't, by field.
pub fn compile(devices: &[LinuxDeviceCgroup]) -> Result<Program, Failure> {
    let mut rules = Vec::with_capacity(devices.len() + ALWAYS.len());
    for (index, device) in devices.iter().enumerate() {
        let refuse = |(field, why): (&str, String)| {
            Failure::config(format!("linux.resources.devices[{index}].{field}: {why}"))
        };
        rules.push(from_spec(device).map_err(refuse)?);
    }
    rules.extend(ALWAYS);
    Ok(Program::new(&rules))
}

fn from_spec(device: &LinuxDeviceCgroup) -> Result<Rule, (&'static str, String)> {
    let number = |field, value: Option<i64>| match value {
        None | Some(-1) => Ok(None),
        Some(value) => u32::try_from(value)
            .map(Some)
            .map_err(|_| (field, format!("{value} is no number of a device; -1 stands for any"))),
    };
    let letters = device.access().as_deref().unwrap_or_default();
    let access = Access::from_letters(letters).filter(|access| access.0 != 0);
    let unknown = || ("access", format!("{letters:?} is not made of the letters r, w and m"));
    Ok(Rule {
        allow: device.allow(),
        device: match device.typ() {
            None | Some(LinuxDeviceType::A) => None,
            Some(LinuxDeviceType::B) => Some(Type::Block),
            Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(Type::Character),
            Some(LinuxDeviceType::P) => {
                return Err(("type", "\"p\" is no device; use a, b, c or u".to_owned()));
            }
        },
        major: number("major", device.major())?,
        minor: number("minor", device.minor())?,
        access: access.ok_or_else(unknown)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn list(devices: serde_json::Value) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_value(devices).unwrap()
    }

    #[test]
    fn what_is_no_rule_is_refused_by_field() {
        let cases = [
            (json!({"allow": true}), "devices[1].access: \"\" is not made"),
            (json!({"allow": false, "access": ""}), "devices[1].access"),
            (json!({"allow": true, "access": "rx"}), "devices[1].access: \"rx\""),
            (json!({"allow": true, "access": "r", "type": "p"}), "devices[1].type: \"p\""),
            (json!({"allow": true, "access": "r", "major": -2}), "devices[1].major: -2"),
            (json!({"allow": true, "access": "r", "minor": 1u64 << 32}), "devices[1].minor"),
        ];
        for (rule, expected) in cases {
            let good = json!({"allow": false, "access": "rwm"});
            let refused = compile(&list(json!([good, rule]))).unwrap_err().to_string();
            assert!(refused.contains(expected), "{rule}: {refused}");
        }
    }

    #[test]
    fn all_devices_are_allowed_by_a_last_rule_without_limits() {
        let all = json!({"allow": true, "access": "rwm"});
        let none = json!({"allow": false, "access": "rwm"});
        let said = json!({"allow": true, "access": "mrw", "type": "a", "major": -1, "minor": -1});
        for (rules, expected) in [
            (json!([]), false),
            (json!([all]), true),
            (json!([none, said]), true),
            (json!([all, none]), false),
            (json!([{"allow": true, "access": "rw"}]), false),
            (json!([{"allow": true, "access": "rwm", "type": "c"}]), false),
            (json!([{"allow": true, "access": "rwm", "major": 1}]), false),
        ] {
            assert_eq!(allow_all(&list(rules.clone())), expected, "{rules}");
        }
    }

    #[test]
    fn letters_are_a_set() {
        assert_eq!(Access::from_letters("rwm"), Some(Access::ALL));
        assert_eq!(Access::from_letters("mm"), Some(Access::MKNOD));
        assert_eq!(Access::from_letters("R"), None);
    }
}
