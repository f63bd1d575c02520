//! A small evaluator for the BPF that seccomp filters are made of, so that tests can ask a compiled
//! profile for its verdict on any call.

use seccompiler::sock_filter;

/// `struct seccomp_data`, without the instruction pointer, which no filter here reads.
#[derive(Debug, Clone, Copy)]
pub struct Call {
    pub number: u32,
    pub arch: u32,
    pub args: [u64; 6],
}

impl Call {
    fn word(&self, offset: u32) -> u32 {
        match offset {
            0 => self.number,
            4 => self.arch,
            16..64 if offset.is_multiple_of(4) => {
                let argument = self.args[(offset as usize - 16) / 8];
                if offset.is_multiple_of(8) { argument as u32 } else { (argument >> 32) as u32 }
            }
            _ => panic!("load from offset {offset}"),
        }
    }
}

/// The verdict of a filter.
pub fn run(program: &[sock_filter], call: &Call) -> u32 {
    let (mut accumulator, mut at) = (0u32, 0usize);
    loop {
        let step = &program[at];
        at += 1;
        let test = |holds: bool| usize::from(if holds { step.jt } else { step.jf });
        match u32::from(step.code) {
            0x20 => accumulator = call.word(step.k),
            0x54 => accumulator &= step.k,
            0x05 => at += step.k as usize,
            0x15 => at += test(accumulator == step.k),
            0x25 => at += test(accumulator > step.k),
            0x35 => at += test(accumulator >= step.k),
            0x06 => return step.k,
            code => panic!("instruction {code:#x} at {}", at - 1),
        }
    }
}
