//! From a checked profile to one BPF program.

use std::collections::BTreeMap;

use kiln_protocol::FailurePhase;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, sock_filter,
};

use super::install::Filter;
use super::profile::{Action, Condition, ENOSYS, Operator, Profile, Rule};
use crate::failure::{During, Failure};

/// Set in the number of every system call of the x32 ABI (`__X32_SYSCALL_BIT`).
const X32_BIT: u32 = 0x4000_0000;

/// `AUDIT_ARCH_X86_64` of linux/audit.h.
const ARCH_X86_64: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data`.
const NUMBER_OFFSET: u32 = 0;
const ARCH_OFFSET: u32 = 4;

/// What a section returns where none of its rules match, until it is linked to the next section. No
/// profile can ask for it: its errnos end at 4095.
const NO_MATCH: SeccompAction = SeccompAction::Trace(0xffff);

/// Compiles a profile to the filter that carries it out.
///
/// # Errors
/// A profile of more rules than a BPF program can hold.
pub fn compile(profile: &Profile) -> Result<Filter, Failure> {
    let mut sections: BTreeMap<Action, Vec<&Rule>> = BTreeMap::new();
    for rule in without_shadowed(&profile.rules) {
        sections.entry(rule.action).or_default().push(rule);
    }
    let mut program = foreign_abi_check();
    for (action, rules) in sections {
        let section =
            section(&rules, action).during(FailurePhase::Config, || "linux.seccomp.syscalls")?;
        program.extend(section);
    }
    if let Some(highest) = profile.highest_known {
        program.push(statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER_OFFSET));
        program.push(jump(libc::BPF_JGT, highest, 0, 1));
        program.push(verdict(ENOSYS));
    }
    program.push(verdict(profile.default));
    if program.len() > libc::BPF_MAXINSNS as usize {
        return Err(Failure::config(format!(
            "linux.seccomp.syscalls: {} instructions, the kernel takes {}",
            program.len(),
            libc::BPF_MAXINSNS
        )));
    }
    Ok(Filter::new(program, profile.flags))
}

/// Drops the rules with conditions where another rule covers the whole system call, and of two rules
/// that do, the later one.
fn without_shadowed(rules: &[Rule]) -> Vec<&Rule> {
    let mut whole = BTreeMap::new();
    for rule in rules.iter().filter(|rule| rule.conditions.is_empty()) {
        whole.entry(rule.number).or_insert(rule);
    }
    let conditional = rules.iter().filter(|rule| !whole.contains_key(&rule.number));
    conditional.chain(whole.values().copied()).collect()
}

/// The program that returns `action` where one of the rules matches and otherwise falls off its end.
fn section(rules: &[&Rule], action: Action) -> Result<BpfProgram, seccompiler::BackendError> {
    let mut chains: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for rule in rules {
        let chain = chains.entry(i64::from(rule.number)).or_default();
        if !rule.conditions.is_empty() {
            let conditions: Result<Vec<_>, _> = rule.conditions.iter().map(condition).collect();
            chain.push(SeccompRule::new(conditions?)?);
        }
    }
    let matched = in_seccompiler(action);
    let filter = SeccompFilter::new(chains, NO_MATCH, matched, TargetArch::x86_64)?;
    let mut program: BpfProgram = filter.try_into()?;
    let no_match = u32::from(NO_MATCH);
    let length = program.len();
    for (at, step) in program.iter_mut().enumerate() {
        if u32::from(step.code) == libc::BPF_RET | libc::BPF_K && step.k == no_match {
            *step = statement(libc::BPF_JMP | libc::BPF_JA, (length - at - 1) as u32);
        }
    }
    Ok(program)
}

/// Kills the process unless the call is of the x86-64 ABI proper.
fn foreign_abi_check() -> BpfProgram {
    vec![
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, ARCH_OFFSET),
        jump(libc::BPF_JEQ, ARCH_X86_64, 0, 2),
        statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, NUMBER_OFFSET),
        jump(libc::BPF_JGE, X32_BIT, 0, 1),
        verdict(Action::KillProcess),
    ]
}

fn condition(condition: &Condition) -> Result<SeccompCondition, seccompiler::BackendError> {
    let operator = match condition.operator {
        Operator::NotEqual => SeccompCmpOp::Ne,
        Operator::Less => SeccompCmpOp::Lt,
        Operator::LessOrEqual => SeccompCmpOp::Le,
        Operator::Equal => SeccompCmpOp::Eq,
        Operator::GreaterOrEqual => SeccompCmpOp::Ge,
        Operator::Greater => SeccompCmpOp::Gt,
        Operator::MaskedEqual(mask) => SeccompCmpOp::MaskedEq(mask),
    };
    SeccompCondition::new(condition.argument, SeccompCmpArgLen::Qword, operator, condition.value)
}

fn in_seccompiler(action: Action) -> SeccompAction {
    match action {
        Action::KillProcess => SeccompAction::KillProcess,
        Action::KillThread => SeccompAction::KillThread,
        Action::Trap => SeccompAction::Trap,
        Action::Errno(errno) => SeccompAction::Errno(errno.into()),
        Action::Trace(message) => SeccompAction::Trace(message.into()),
        Action::Log => SeccompAction::Log,
        Action::Allow => SeccompAction::Allow,
    }
}

fn verdict(action: Action) -> sock_filter {
    statement(libc::BPF_RET | libc::BPF_K, in_seccompiler(action).into())
}

fn statement(code: u32, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { code: (libc::BPF_JMP | test | libc::BPF_K) as u16, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seccomp::evaluate::{self, Call};
    use proptest::prelude::*;

    fn call(number: u32, args: [u64; 6]) -> Call {
        Call { number, arch: ARCH_X86_64, args }
    }

    /// What a profile means, read off its definition.
    fn meant(profile: &Profile, call: &Call) -> Action {
        if call.arch != ARCH_X86_64 || call.number >= X32_BIT {
            return Action::KillProcess;
        }
        let of_call = || profile.rules.iter().filter(|rule| rule.number == call.number);
        if let Some(whole) = of_call().find(|rule| rule.conditions.is_empty()) {
            return whole.action;
        }
        let strictest = of_call()
            .filter(|rule| rule.conditions.iter().all(|c| holds(c, call)))
            .map(|rule| rule.action)
            .min();
        if let Some(action) = strictest {
            return action;
        }
        if profile.highest_known.is_some_and(|highest| call.number > highest) {
            return ENOSYS;
        }
        profile.default
    }

    fn holds(condition: &Condition, call: &Call) -> bool {
        let (argument, value) = (call.args[usize::from(condition.argument)], condition.value);
        match condition.operator {
            Operator::NotEqual => argument != value,
            Operator::Less => argument < value,
            Operator::LessOrEqual => argument <= value,
            Operator::Equal => argument == value,
            Operator::GreaterOrEqual => argument >= value,
            Operator::Greater => argument > value,
            Operator::MaskedEqual(mask) => argument & mask == value & mask,
        }
    }

    fn verdict_of(profile: &Profile, call: &Call) -> u32 {
        evaluate::run(compile(profile).expect("compiles").program(), call)
    }

    fn actions() -> impl Strategy<Value = Action> {
        prop_oneof![
            Just(Action::KillProcess),
            Just(Action::KillThread),
            Just(Action::Trap),
            (0u16..4).prop_map(Action::Errno),
            Just(Action::Trace(7)),
            Just(Action::Log),
            Just(Action::Allow),
        ]
    }

    /// Values that meet each other often, on both sides of the 32-bit boundary.
    fn values() -> impl Strategy<Value = u64> {
        prop_oneof![
            0u64..4,
            (0u64..4).prop_map(|v| v << 32),
            (0u64..4).prop_map(|v| (1 << 32) + v),
            (0u64..4).prop_map(|v| u64::MAX - v),
            Just(0x7fff_ffff),
            Just(0x8000_0000),
        ]
    }

    fn operators() -> impl Strategy<Value = Operator> {
        prop_oneof![
            Just(Operator::NotEqual),
            Just(Operator::Less),
            Just(Operator::LessOrEqual),
            Just(Operator::Equal),
            Just(Operator::GreaterOrEqual),
            Just(Operator::Greater),
            values().prop_map(Operator::MaskedEqual),
        ]
    }

    fn rules() -> impl Strategy<Value = Rule> {
        let condition = (0u8..3, operators(), values())
            .prop_map(|(argument, operator, value)| Condition { argument, operator, value });
        (0u32..6, prop::collection::vec(condition, 0..3), actions())
            .prop_map(|(number, conditions, action)| Rule { number, conditions, action })
    }

    fn profiles() -> impl Strategy<Value = Profile> {
        (actions(), prop::collection::vec(rules(), 0..8), prop::option::of(5u32..8)).prop_map(
            |(default, rules, highest)| {
                let strict = !matches!(default, Action::Allow | Action::Log | Action::Trace(_));
                let rules = rules.into_iter().filter(|rule| rule.action != default).collect();
                let highest_known = highest.filter(|_| strict && default != ENOSYS);
                Profile { default, rules, highest_known, flags: 0 }
            },
        )
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1500))]
        #[test]
        fn filters_do_what_the_profile_means(
            profile in profiles(),
            numbers in prop::collection::vec((0u32..10, [values(), values(), values()]), 1..12),
        ) {
            for (number, [a, b, c]) in numbers {
                let call = call(number, [a, b, c, 0, 0, 0]);
                let meant = u32::from(in_seccompiler(meant(&profile, &call)));
                prop_assert_eq!(verdict_of(&profile, &call), meant, "{:?}", call);
            }
        }

        #[test]
        fn another_abi_is_never_let_through(
            profile in profiles(), number in any::<u32>(), arch in any::<u32>(),
        ) {
            let kill = u32::from(SeccompAction::KillProcess);
            let x32 = Call { number: number | X32_BIT, arch: ARCH_X86_64, args: [0; 6] };
            prop_assert_eq!(verdict_of(&profile, &x32), kill);
            prop_assume!(arch != ARCH_X86_64);
            let foreign = Call { number, arch, args: [0; 6] };
            prop_assert_eq!(verdict_of(&profile, &foreign), kill);
        }
    }

    #[test]
    fn number_above_the_profile_is_enosys_and_below_it_the_default() {
        let rule = Rule { number: 10, conditions: vec![], action: Action::Allow };
        let profile = Profile {
            default: Action::Errno(1),
            rules: vec![rule],
            highest_known: Some(10),
            flags: 0,
        };
        assert_eq!(verdict_of(&profile, &call(11, [0; 6])), 0x0005_0000 | libc::ENOSYS as u32);
        assert_eq!(verdict_of(&profile, &call(9, [0; 6])), 0x0005_0001);
        assert_eq!(verdict_of(&profile, &call(10, [0; 6])), 0x7fff_0000);
    }

    #[test]
    fn profile_too_long_for_the_kernel_is_refused() {
        let rule = |number| Rule {
            number,
            conditions: vec![Condition { argument: 0, operator: Operator::Equal, value: 1 }],
            action: Action::Allow,
        };
        let with = |count| Profile {
            default: Action::Errno(1),
            rules: (0..count).map(rule).collect(),
            highest_known: None,
            flags: 0,
        };
        let last = call(399, [1, 0, 0, 0, 0, 0]);
        assert_eq!(verdict_of(&with(400), &last), 0x7fff_0000);
        let failure = compile(&with(1000)).expect_err("too long");
        assert!(failure.message.starts_with("linux.seccomp.syscalls: "), "{}", failure.message);
    }
}
