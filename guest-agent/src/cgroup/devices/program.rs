//! Rules as a program of the kernel's extended BPF (kernel: `Documentation/bpf/standardization`).
//!
//! It is called with a `struct bpf_cgroup_dev_ctx` and returns 1 to allow, 0 to refuse. From the last
//! rule to the first, each takes those accesses that it speaks of out of what is asked for, or ends in
//! a refusal; with nothing left to ask, the answer is yes. There are no loops, no memory and no
//! helper functions.

use super::{Access, Rule};

/// One instruction, as the kernel reads it (`struct bpf_insn`).
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instruction {
    code: u8,
    /// The destination in the low four bits, the source in the high ones.
    registers: u8,
    offset: i16,
    immediate: i32,
}

/// A program for a cgroup's devices.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    instructions: Vec<Instruction>,
}

/// The registers: the result, the context, what is asked for, and the rule's difference from it.
const RESULT: u8 = 0;
const CONTEXT: u8 = 1;
const TYPE: u8 = 2;
const ASKED: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;
const DIFFERENCE: u8 = 6;
const ONE_DIFFERENCE: u8 = 7;

/// Operations on 32 bits, with an immediate operand if not said otherwise.
const LOAD: u8 = 0x61;
const MOVE: u8 = 0xb4;
const MOVE_REGISTER: u8 = 0xbc;
const AND: u8 = 0x54;
const OR_REGISTER: u8 = 0x4c;
const XOR: u8 = 0xa4;
const SHIFT_RIGHT: u8 = 0x74;
const JUMP_IF_EQUAL: u8 = 0x16;
const JUMP_UNLESS_EQUAL: u8 = 0x56;
const EXIT: u8 = 0x95;

impl Program {
    pub(super) fn new(rules: &[Rule]) -> Self {
        let mut instructions = vec![
            load(TYPE, 0),
            register(MOVE_REGISTER, ASKED, TYPE),
            immediate(SHIFT_RIGHT, ASKED, 16),
            immediate(AND, TYPE, 0xffff),
            load(MAJOR, 4),
            load(MINOR, 8),
        ];
        for rule in rules.iter().rev() {
            instructions.extend(of_rule(rule));
        }
        instructions.extend(answer(false));
        Self { instructions }
    }

    /// The instructions.
    pub fn instructions(&self) -> &[Instruction] {
        &self.instructions
    }
}

/// One rule. It compares once, for all conditions: with a jump for each, the kernel's verifier would
/// follow both ways with what each tells it of the numbers, and give up on a few hundred rules.
fn of_rule(rule: &Rule) -> Vec<Instruction> {
    let body = if rule.allow { allow(rule.access) } else { refuse(rule.access) };
    let conditions = [
        rule.device.map(|device| (TYPE, device as u32)),
        rule.major.map(|major| (MAJOR, major)),
        rule.minor.map(|minor| (MINOR, minor)),
    ];
    let mut instructions = vec![immediate(MOVE, DIFFERENCE, 0)];
    for (of_device, value) in conditions.into_iter().flatten() {
        instructions.extend([
            register(MOVE_REGISTER, ONE_DIFFERENCE, of_device),
            // All 32 bits count: what the cast does to the sign doesn't matter.
            immediate(XOR, ONE_DIFFERENCE, value as i32),
            register(OR_REGISTER, DIFFERENCE, ONE_DIFFERENCE),
        ]);
    }
    instructions.push(jump(JUMP_UNLESS_EQUAL, DIFFERENCE, 0, body.len()));
    instructions.extend(body);
    instructions
}

/// Takes `access` out of what is asked for; if nothing is left, it is allowed.
fn allow(access: Access) -> Vec<Instruction> {
    let rest = i32::from(Access::ALL.0 & !access.0);
    let done = answer(true);
    let left = jump(JUMP_UNLESS_EQUAL, ASKED, 0, done.len());
    [immediate(AND, ASKED, rest), left].into_iter().chain(done).collect()
}

/// Refuses what is asked for if some of it is in `access`.
fn refuse(access: Access) -> Vec<Instruction> {
    let done = answer(false);
    let copy = register(MOVE_REGISTER, RESULT, ASKED);
    let other = jump(JUMP_IF_EQUAL, RESULT, 0, done.len());
    [copy, immediate(AND, RESULT, i32::from(access.0)), other].into_iter().chain(done).collect()
}

fn answer(allowed: bool) -> [Instruction; 2] {
    [immediate(MOVE, RESULT, i32::from(allowed)), immediate(EXIT, 0, 0)]
}

fn immediate(code: u8, register: u8, immediate: i32) -> Instruction {
    Instruction { code, registers: register, offset: 0, immediate }
}

fn register(code: u8, register: u8, source: u8) -> Instruction {
    Instruction { registers: register | source << 4, ..immediate(code, 0, 0) }
}

fn load(register: u8, offset: i16) -> Instruction {
    let registers = register | CONTEXT << 4;
    Instruction { code: LOAD, registers, offset, immediate: 0 }
}

/// A jump over `over` instructions, a handful.
fn jump(code: u8, register: u8, value: i32, over: usize) -> Instruction {
    Instruction { code, registers: register, offset: over as i16, immediate: value }
}

#[cfg(test)]
mod tests {
    use super::super::{ALWAYS, Type};
    use super::*;
    use proptest::prelude::*;

    /// What somebody asks for.
    #[derive(Debug, Clone, Copy)]
    struct Asked {
        device: Type,
        number: (u32, u32),
        access: Access,
    }

    /// What an interpreter makes of the program.
    fn run(program: &Program, asked: Asked) -> bool {
        let bytes = program.instructions.iter().flat_map(|instruction| {
            let Instruction { code, registers, offset, immediate } = *instruction;
            let mut bytes = vec![code, registers];
            bytes.extend(offset.to_le_bytes());
            bytes.extend(immediate.to_le_bytes());
            bytes
        });
        let bytes: Vec<u8> = bytes.collect();
        let words =
            [u32::from(asked.access.0) << 16 | asked.device as u32, asked.number.0, asked.number.1];
        let mut context: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let machine = rbpf::EbpfVmRaw::new(Some(&bytes)).unwrap();
        match machine.execute_program(&mut context).unwrap() {
            0 => false,
            1 => true,
            other => panic!("{other}"),
        }
    }

    /// The rules' meaning, access by access.
    fn meant(rules: &[Rule], asked: Asked) -> bool {
        let mut bits = [1, 2, 4].into_iter().filter(|bit| asked.access.0 & bit != 0);
        bits.all(|bit| {
            let speaks = |rule: &&Rule| {
                rule.device.is_none_or(|device| device == asked.device)
                    && rule.major.is_none_or(|major| major == asked.number.0)
                    && rule.minor.is_none_or(|minor| minor == asked.number.1)
                    && rule.access.0 & bit != 0
            };
            rules.iter().rev().find(speaks).is_some_and(|rule| rule.allow)
        })
    }

    fn a_type() -> impl Strategy<Value = Type> {
        prop_oneof![Just(Type::Block), Just(Type::Character)]
    }

    /// Few numbers, that rules and questions meet, and the greatest.
    fn number() -> impl Strategy<Value = u32> {
        prop_oneof![0..3u32, Just(u32::MAX), Just(1 << 31)]
    }

    fn rule() -> impl Strategy<Value = Rule> {
        let number = || proptest::option::of(number());
        (any::<bool>(), proptest::option::of(a_type()), number(), number(), 1..8u8).prop_map(
            |(allow, device, major, minor, access)| {
                let access = Access(access);
                Rule { allow, device, major, minor, access }
            },
        )
    }

    proptest! {
        #[test]
        fn a_program_answers_as_its_rules_mean(
            rules in proptest::collection::vec(rule(), 0..20),
            device in a_type(),
            number in (number(), number()),
            access in 1..8u8,
        ) {
            let asked = Asked { device, number, access: Access(access) };
            prop_assert_eq!(run(&Program::new(&rules), asked), meant(&rules, asked));
        }
    }

    #[test]
    fn rights_of_several_rules_add_up_and_the_last_word_counts() {
        let number = (10, 229);
        let one = |allow, access| Rule {
            allow,
            device: Some(Type::Character),
            major: Some(10),
            minor: Some(229),
            access: Access(access),
        };
        let (read, write) = (2, 4);
        let asked = |access| Asked { device: Type::Character, number, access: Access(access) };
        let both = Program::new(&[one(true, read), one(true, write)]);
        assert!(run(&both, asked(read | write)));
        let taken_back = Program::new(&[one(true, read | write), one(false, write)]);
        assert!(run(&taken_back, asked(read)));
        assert!(!run(&taken_back, asked(read | write)));
        assert!(!run(&Program::new(&[]), asked(read)));
    }

    #[test]
    fn default_devices_and_any_node_are_allowed() {
        let program = Program::new(&ALWAYS);
        let ask = |device, number, access| run(&program, Asked { device, number, access });
        assert!(ask(Type::Character, (1, 3), Access::ALL));
        assert!(ask(Type::Character, (136, 7), Access::ALL));
        assert!(ask(Type::Block, (7, 0), Access::MKNOD));
        assert!(!ask(Type::Block, (7, 0), Access::ALL));
        assert!(!ask(Type::Character, (1, 11), Access(2)));
        assert!(!ask(Type::Character, (10, 200), Access(4)));
    }
}
