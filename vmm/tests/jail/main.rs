//! Each jail, attacked from inside and looked at from outside.
//!
//! The test binary starts itself anew as the process to be jailed: in place of `kiln vmm` or
//! `kiln devices`, with the very jail that those enter. It then tries one thing that nobody who
//! takes the component over may be able to do.
//!
//! They need root, as kiln does for the identities it tests.

// Without the built-in harness the compiler doesn't know that this is a test.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod attacks;
mod attempts;
mod foreign;
mod inmate;
mod outside;
mod place;
mod threads;

use std::process::ExitCode;

use libtest_mimic::{Arguments, Trial};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(1).is_some_and(|first| first == inmate::FLAG) {
        return inmate::main(&arguments[2..]);
    }
    let mut trials = attacks::trials();
    trials.extend(outside::trials());
    trials.extend(foreign::trials());
    trials.extend(threads::trials());
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

/// A test by a name and what it does.
fn trial(name: impl Into<String>, test: impl FnOnce() + Send + 'static) -> Trial {
    Trial::test(name, move || {
        test();
        Ok(())
    })
}
