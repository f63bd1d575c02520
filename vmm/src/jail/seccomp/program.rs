//! A list as a program of the kernel's packet filter (`struct sock_filter`, kernel
//! Documentation/userspace-api/seccomp_filter.rst).
//!
//! The kernel checks, translates and tries a program when it is loaded, for every call there is, and
//! each thread of a machine loads one: they are a good part of what a start costs. So a call's number,
//! and an argument that must be one of several values, are looked for by halves, neighbours that are
//! answered alike are one, and what is answered stands in a program once.
//!
//! Jumps lead forward only. A program is thus written from its end: what it jumps to is there already.

use std::collections::BTreeMap;

use seccompiler::sock_filter;

use super::{Rule, When};

/// `AUDIT_ARCH_X86_64` (include/uapi/linux/audit.h).
const ARCHITECTURE: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE_OFFSET: u32 = 4;
const ARGUMENTS: u32 = 16;

/// How far a conditional jump reaches (`__u8 jt, jf`), less the two bridges that may be put in
/// between.
const REACH: usize = u8::MAX as usize - 2;

/// Writes a program that allows what one of the rules allows, and raises `SIGSYS` for anything else.
/// `clone3` fails with `ENOSYS`; a call that isn't one of x86-64's own ends the process.
pub(super) fn compile(lists: &[&[Rule]]) -> Vec<sock_filter> {
    let mut program = Program::default();
    let trap = program.answer(libc::SECCOMP_RET_TRAP);
    let allow = program.answer(libc::SECCOMP_RET_ALLOW);
    let missing = program.answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32);
    let end = program.answer(libc::SECCOMP_RET_KILL_PROCESS);

    let mut rules: BTreeMap<u32, Vec<&[When]>> = BTreeMap::new();
    for rule in lists.iter().copied().flatten() {
        rules.entry(rule.call as u32).or_default().push(rule.when);
    }
    let mut answers: BTreeMap<u32, Place> = rules
        .into_iter()
        .map(|(call, alternatives)| (call, program.any_of(&alternatives, allow, trap)))
        .collect();
    answers.insert(libc::SYS_clone3 as u32, missing);

    let found = program.search(&answers, trap);
    let number = program.load(NUMBER, found);
    let known = program.jump(Test::Equal, ARCHITECTURE, number, end);
    program.load(ARCHITECTURE_OFFSET, known);
    program.into_instructions()
}

/// An instruction, counted from the end of its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Place(usize);

#[derive(Debug, Clone, Copy)]
enum Test {
    Equal,
    AtLeast,
    HasBits,
}

impl Test {
    fn code(self) -> u32 {
        match self {
            Self::Equal => libc::BPF_JEQ,
            Self::AtLeast => libc::BPF_JGE,
            Self::HasBits => libc::BPF_JSET,
        }
    }
}

#[derive(Default)]
struct Program {
    /// The last one first.
    instructions: Vec<sock_filter>,
    /// The latest unconditional jump to a place that was too far away.
    bridges: BTreeMap<Place, Place>,
}

impl Program {
    fn into_instructions(mut self) -> Vec<sock_filter> {
        self.instructions.reverse();
        self.instructions
    }

    fn push(&mut self, code: u32, jumps: (u8, u8), k: u32) -> Place {
        let (jt, jf) = jumps;
        self.instructions.push(sock_filter { code: code as u16, jt, jf, k });
        Place(self.instructions.len() - 1)
    }

    fn answer(&mut self, answer: u32) -> Place {
        self.push(libc::BPF_RET | libc::BPF_K, (0, 0), answer)
    }

    /// How many instructions lie between the next one and a place.
    fn distance(&self, to: Place) -> usize {
        self.instructions.len() - 1 - to.0
    }

    fn go_to(&mut self, to: Place) -> Place {
        let distance = self.distance(to) as u32;
        self.push(libc::BPF_JMP | libc::BPF_JA, (0, 0), distance)
    }

    /// Loads a word of the call's data, and goes on at `then`.
    fn load(&mut self, offset: u32, then: Place) -> Place {
        if self.distance(then) > 0 {
            self.go_to(then);
        }
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, (0, 0), offset)
    }

    fn jump(&mut self, test: Test, value: u32, then: Place, otherwise: Place) -> Place {
        let (then, otherwise) = (self.within_reach(then), self.within_reach(otherwise));
        let jumps = (self.distance(then) as u8, self.distance(otherwise) as u8);
        self.push(libc::BPF_JMP | test.code() | libc::BPF_K, jumps, value)
    }

    /// A place that a conditional jump can name, and that leads to the one wanted.
    fn within_reach(&mut self, place: Place) -> Place {
        if self.distance(place) <= REACH {
            return place;
        }
        match self.bridges.get(&place) {
            Some(bridge) if self.distance(*bridge) <= REACH => *bridge,
            _ => {
                let bridge = self.go_to(place);
                self.bridges.insert(place, bridge);
                bridge
            }
        }
    }

    /// Tests whether all conditions of one of the alternatives hold.
    fn any_of(&mut self, alternatives: &[&[When]], then: Place, otherwise: Place) -> Place {
        if alternatives.iter().any(|conditions| conditions.is_empty()) {
            return then;
        }
        let mut values: BTreeMap<u8, BTreeMap<u32, Place>> = BTreeMap::new();
        let mut others = otherwise;
        for conditions in alternatives {
            match **conditions {
                [When::Is(argument, value)] => {
                    values.entry(argument).or_default().insert(value, then);
                }
                _ => others = self.all_of(conditions, then, others),
            }
        }
        values.into_iter().fold(others, |others, (argument, values)| {
            let found = self.search(&values, others);
            self.load(low_half(argument), found)
        })
    }

    fn all_of(&mut self, conditions: &[When], then: Place, otherwise: Place) -> Place {
        conditions.iter().rev().fold(then, |then, condition| {
            let (argument, tested) = match *condition {
                When::Is(argument, value) => {
                    (argument, self.jump(Test::Equal, value, then, otherwise))
                }
                When::Lacks(argument, bits) => {
                    (argument, self.jump(Test::HasBits, bits, otherwise, then))
                }
                When::IsOwnPid(argument) => {
                    (argument, self.jump(Test::Equal, std::process::id(), then, otherwise))
                }
            };
            self.load(low_half(argument), tested)
        })
    }

    /// Goes to the place of the value that was loaded.
    fn search(&mut self, places: &BTreeMap<u32, Place>, otherwise: Place) -> Place {
        self.search_ranges(&ranges(places, otherwise))
    }

    fn search_ranges(&mut self, ranges: &[Range]) -> Place {
        match *ranges {
            [] => unreachable!("a value is always in some range"),
            [Range { place, .. }] => place,
            [below, value, above] if below.place == above.place && above.from == value.from + 1 => {
                self.jump(Test::Equal, value.from, value.place, below.place)
            }
            _ => {
                let (below, above) = ranges.split_at(ranges.len() / 2);
                let from = above[0].from;
                let (below, above) = (self.search_ranges(below), self.search_ranges(above));
                self.jump(Test::AtLeast, from, above, below)
            }
        }
    }
}

/// Values from one on, until the next range's, and where they lead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    from: u32,
    place: Place,
}

/// All values, as ranges that lead to another place each than their neighbours.
fn ranges(places: &BTreeMap<u32, Place>, otherwise: Place) -> Vec<Range> {
    let mut ranges = vec![Range { from: 0, place: otherwise }];
    let mut add = |from, place| {
        if ranges.last().is_some_and(|last| last.from == from) {
            ranges.pop();
        }
        if ranges.last().is_none_or(|last| last.place != place) {
            ranges.push(Range { from, place });
        }
    };
    for (value, place) in places {
        add(*value, *place);
        if let Some(next) = value.checked_add(1) {
            add(next, otherwise);
        }
    }
    ranges
}

/// Where the lower 32 bits of an argument are.
fn low_half(argument: u8) -> u32 {
    ARGUMENTS + 8 * u32::from(argument)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::lists::threads;
    use super::super::{DEVICES, VMM, allow, allow_when};
    use super::*;

    const TRAP: u32 = libc::SECCOMP_RET_TRAP;
    const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;

    #[derive(Debug, Clone, Copy)]
    struct Call {
        number: u32,
        architecture: u32,
        arguments: [u64; 6],
    }

    fn call(number: u32, arguments: [u64; 6]) -> Call {
        Call { number, architecture: ARCHITECTURE, arguments }
    }

    /// Runs a program as the kernel would.
    fn run(program: &[sock_filter], call: &Call) -> u32 {
        let (mut word, mut at) = (0, 0);
        loop {
            let step = &program[at];
            at += 1;
            let jump = |holds| usize::from(if holds { step.jt } else { step.jf });
            match u32::from(step.code) {
                0x20 => {
                    word = match step.k {
                        0 => call.number,
                        4 => call.architecture,
                        offset => call.arguments[(offset as usize - 16) / 8] as u32,
                    }
                }
                0x05 => at += step.k as usize,
                0x15 => at += jump(word == step.k),
                0x35 => at += jump(word >= step.k),
                0x45 => at += jump(word & step.k != 0),
                0x06 => return step.k,
                code => panic!("instruction {code:#x} at {}", at - 1),
            }
        }
    }

    /// What the rules say, one after the other.
    fn meant(lists: &[&[Rule]], call: &Call) -> u32 {
        let holds = |when: &When| {
            let argument = |index: u8| call.arguments[usize::from(index)] as u32;
            match *when {
                When::Is(index, value) => argument(index) == value,
                When::Lacks(index, bits) => argument(index) & bits == 0,
                When::IsOwnPid(index) => argument(index) == std::process::id(),
            }
        };
        let mut rules = lists.iter().copied().flatten();
        if call.number == libc::SYS_clone3 as u32 {
            libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32
        } else if rules.any(|rule| rule.call as u32 == call.number && rule.when.iter().all(holds)) {
            ALLOW
        } else {
            TRAP
        }
    }

    /// Every value that a condition of the lists names, its neighbours, and none and all bits.
    fn values(lists: &[&[Rule]]) -> Vec<u32> {
        let conditions = lists.iter().copied().flatten().flat_map(|rule| rule.when);
        let named = conditions.map(|when| match *when {
            When::Is(_, value) | When::Lacks(_, value) => value,
            When::IsOwnPid(_) => std::process::id(),
        });
        let mut values: Vec<u32> = named
            .flat_map(|value| [value.wrapping_sub(1), value, value.wrapping_add(1)])
            .chain([0, u32::MAX])
            .collect();
        values.sort_unstable();
        values.dedup();
        values
    }

    fn all_lists() -> Vec<&'static [&'static [Rule]]> {
        let threads = [threads::PROCESSOR, threads::STORAGE, threads::NETWORK, threads::STREAMS];
        let waiting = [threads::SERIAL, threads::WATCH, threads::WAITING];
        [VMM, DEVICES].into_iter().chain(threads).chain(waiting).collect()
    }

    #[test]
    fn every_list_says_what_its_rules_say() {
        for lists in all_lists() {
            let program = compile(lists);
            let values = values(lists);
            for number in 0..600 {
                for value in &values {
                    // All bits of the other half are set: they don't count.
                    let call = call(number, [u64::from(*value) | 0xffff_ffff << 32; 6]);
                    assert_eq!(run(&program, &call), meant(lists, &call), "{call:?}");
                }
            }
        }
    }

    #[test]
    fn calls_of_other_kinds_are_not_allowed() {
        let program = compile(VMM);
        let read = call(libc::SYS_read as u32, [0; 6]);
        assert_eq!(run(&program, &read), ALLOW);
        let x32 = Call { number: read.number | 0x4000_0000, ..read };
        assert_eq!(run(&program, &x32), TRAP);
        let i386 = Call { architecture: 0x4000_0003, ..read };
        assert_eq!(run(&program, &i386), libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn a_program_that_is_longer_than_its_jumps_reach_says_what_its_rules_say() {
        let conditions: &'static [When] = &[When::Is(0, 7), When::Lacks(1, 3)];
        let rules: Vec<Rule> = (0..900)
            .map(|call| match call % 4 {
                0 => allow(call),
                1 => allow_when(call, &conditions[..1]),
                2 => allow_when(call, conditions),
                _ => allow_when(1000, &conditions[1..]),
            })
            .collect();
        let lists: &[&[Rule]] = &[&rules];
        let program = compile(lists);
        assert!(program.len() > 1000);
        for number in 0..1100 {
            for arguments in [[0, 0], [7, 0], [7, 3], [7, 4], [8, 1]] {
                let call = call(number, [arguments[0], arguments[1], 0, 0, 0, 0]);
                assert_eq!(run(&program, &call), meant(lists, &call), "{call:?}");
            }
        }
    }

    fn a_condition() -> impl Strategy<Value = When> {
        prop_oneof![
            (0..3u8, 0..4u32).prop_map(|(argument, value)| When::Is(argument, value)),
            (0..3u8, 0..4u32).prop_map(|(argument, bits)| When::Lacks(argument, bits)),
            Just(When::Is(0, u32::MAX)),
        ]
    }

    fn a_rule() -> impl Strategy<Value = Rule> {
        let edges = prop_oneof![0..12i64, Just(435), Just(i64::from(u32::MAX))];
        (edges, prop::collection::vec(a_condition(), 0..3))
            .prop_map(|(call, when)| Rule { call, when: Vec::leak(when) })
    }

    proptest! {
        #[test]
        fn any_rules_are_kept(
            rules in prop::collection::vec(a_rule(), 0..20),
            number in prop_oneof![0..13u32, 434..437u32, u32::MAX - 1..=u32::MAX],
            arguments in prop::array::uniform3(prop_oneof![0..5u64, Just(u64::from(u32::MAX))]),
        ) {
            let lists: &[&[Rule]] = &[&rules];
            let call = call(number, [arguments[0], arguments[1], arguments[2], 0, 0, 0]);
            prop_assert_eq!(run(&compile(lists), &call), meant(lists, &call));
        }
    }
}
