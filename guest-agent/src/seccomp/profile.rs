//! A seccomp profile in the terms of this kernel: names resolved, meaningless rules dropped.

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction, LinuxSeccompFilterFlag, LinuxSeccompOperator, LinuxSyscall,
};
use syscalls::x86_64::Sysno;

use crate::failure::Failure;

/// Arguments that a system call can have (`struct seccomp_data`).
const ARGUMENTS: usize = 6;

/// Highest number that a filter can hand back as an errno (`MAX_ERRNO` of the kernel).
const MAX_ERRNO: u32 = 4095;

/// What happens to a system call, the most restrictive first, as the kernel ranks them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Action {
    /// The process dies of SIGSYS.
    KillProcess,
    /// The thread dies of SIGSYS.
    KillThread,
    /// SIGSYS is delivered.
    Trap,
    /// The call fails with this errno, 0 to 4095.
    Errno(u16),
    /// A tracer decides; without one the call fails with `ENOSYS`.
    Trace(u16),
    /// The call is made and logged.
    Log,
    /// The call is made.
    Allow,
}

/// How an argument is compared: as unsigned 64 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operator {
    /// Differs.
    NotEqual,
    /// Is less.
    Less,
    /// Is less or equal.
    LessOrEqual,
    /// Is equal.
    Equal,
    /// Is greater or equal.
    GreaterOrEqual,
    /// Is greater.
    Greater,
    /// Is equal once the mask is applied to both sides.
    MaskedEqual(u64),
}

/// A condition on one argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Condition {
    /// The argument, 0 to 5.
    pub argument: u8,
    /// The comparison.
    pub operator: Operator,
    /// What the argument is compared with.
    pub value: u64,
}

/// What happens to a system call whose arguments meet every condition.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Number of the system call in the x86-64 ABI.
    pub number: u32,
    /// All of these must hold; none means always.
    pub conditions: Vec<Condition>,
    /// The verdict.
    pub action: Action,
}

/// A profile whose fields have all been checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// What happens where no rule matches.
    pub default: Action,
    /// The rules, in the profile's order.
    pub rules: Vec<Rule>,
    /// Calls with numbers above this one fail with `ENOSYS`.
    pub highest_known: Option<u32>,
    /// Flags of seccomp(2).
    pub flags: u32,
}

impl Profile {
    /// Checks `linux.seccomp`.
    ///
    /// # Errors
    /// A field or value that cannot be honoured, by name.
    pub fn from_spec(spec: &LinuxSeccomp) -> Result<Self, Failure> {
        if spec.listener_path().is_some() {
            return Err(refuse("listenerPath", "a listener on the host cannot be notified"));
        }
        if spec.listener_metadata().is_some() {
            return Err(refuse("listenerMetadata", "a listener on the host cannot be notified"));
        }
        let default = action(spec.default_action(), spec.default_errno_ret(), "defaultAction")?;
        let mut rules = Vec::new();
        let mut highest = None;
        for (index, syscall) in spec.syscalls().iter().flatten().enumerate() {
            let field = format!("syscalls[{index}]");
            let action = action(syscall.action(), syscall.errno_ret(), &field)?;
            let alternatives = conditions(syscall, &field)?;
            for number in syscall.names().iter().filter_map(|name| number(name)) {
                highest = highest.max(Some(number));
                if action == default {
                    continue;
                }
                rules.extend(alternatives.iter().map(|conditions| Rule {
                    number,
                    conditions: conditions.clone(),
                    action,
                }));
            }
        }
        let permissive = matches!(default, Action::Allow | Action::Log | Action::Trace(_));
        let highest_known = highest.filter(|_| !permissive && default != ENOSYS);
        Ok(Self { default, rules, highest_known, flags: flags(spec) })
    }
}

/// The verdict for system calls that the profile's author could not know.
pub(super) const ENOSYS: Action = Action::Errno(libc::ENOSYS as u16);

fn refuse(field: &str, why: &str) -> Failure {
    Failure::config(format!("linux.seccomp.{field}: {why}"))
}

fn number(name: &str) -> Option<u32> {
    let number: Sysno = name.parse().ok()?;
    u32::try_from(number.id()).ok()
}

fn action(action: LinuxSeccompAction, errno: Option<u32>, field: &str) -> Result<Action, Failure> {
    let errno = errno.unwrap_or(libc::EPERM as u32);
    let returned = || match u16::try_from(errno) {
        Ok(value) if errno <= MAX_ERRNO => Ok(value),
        _ => Err(refuse(field, &format!("errno {errno} is above {MAX_ERRNO}"))),
    };
    Ok(match action {
        LinuxSeccompAction::ScmpActKill | LinuxSeccompAction::ScmpActKillThread => {
            Action::KillThread
        }
        LinuxSeccompAction::ScmpActKillProcess => Action::KillProcess,
        LinuxSeccompAction::ScmpActTrap => Action::Trap,
        LinuxSeccompAction::ScmpActErrno => Action::Errno(returned()?),
        LinuxSeccompAction::ScmpActTrace => Action::Trace(returned()?),
        LinuxSeccompAction::ScmpActLog => Action::Log,
        LinuxSeccompAction::ScmpActAllow => Action::Allow,
        LinuxSeccompAction::ScmpActNotify => {
            return Err(refuse(
                field,
                "SCMP_ACT_NOTIFY: a listener on the host cannot be notified",
            ));
        }
    })
}

/// The conditions of a rule as alternatives, each a conjunction. Conditions on different arguments
/// must all hold; where one argument has several, runc makes each condition an alternative.
fn conditions(syscall: &LinuxSyscall, field: &str) -> Result<Vec<Vec<Condition>>, Failure> {
    let mut all = Vec::new();
    for arg in syscall.args().iter().flatten() {
        if arg.index() >= ARGUMENTS {
            let why = format!("argument {} does not exist, the last is 5", arg.index());
            return Err(refuse(&format!("{field}.args"), &why));
        }
        let (operator, value) = match arg.op() {
            LinuxSeccompOperator::ScmpCmpNe => (Operator::NotEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpLt => (Operator::Less, arg.value()),
            LinuxSeccompOperator::ScmpCmpLe => (Operator::LessOrEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpEq => (Operator::Equal, arg.value()),
            LinuxSeccompOperator::ScmpCmpGe => (Operator::GreaterOrEqual, arg.value()),
            LinuxSeccompOperator::ScmpCmpGt => (Operator::Greater, arg.value()),
            LinuxSeccompOperator::ScmpCmpMaskedEq => {
                (Operator::MaskedEqual(arg.value()), arg.value_two().unwrap_or(0))
            }
        };
        all.push(Condition { argument: arg.index() as u8, operator, value });
    }
    let repeated = (0..ARGUMENTS)
        .any(|index| all.iter().filter(|c| usize::from(c.argument) == index).count() > 1);
    if repeated {
        return Ok(all.into_iter().map(|condition| vec![condition]).collect());
    }
    Ok(vec![all])
}

fn flags(spec: &LinuxSeccomp) -> u32 {
    let bit = |flag: &LinuxSeccompFilterFlag| match flag {
        LinuxSeccompFilterFlag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
        LinuxSeccompFilterFlag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
        // The process that installs the filters has one thread, and no filter notifies.
        LinuxSeccompFilterFlag::SeccompFilterFlagTsync
        | LinuxSeccompFilterFlag::SeccompFilterFlagWaitKillableRecv => 0,
    };
    spec.flags().iter().flatten().fold(0, |flags, flag| flags | bit(flag) as u32)
}
