//! libFuzzer over the target that the environment variable `KILN_FUZZ_TARGET` names. `fuzz/run`
//! builds and calls it.
#![no_main]

use std::sync::LazyLock;

static TARGET: LazyLock<kiln_fuzz::Target> = LazyLock::new(|| {
    let name = std::env::var("KILN_FUZZ_TARGET").unwrap_or_default();
    kiln_fuzz::target(&name).unwrap_or_else(|| {
        let known: Vec<_> = kiln_fuzz::TARGETS.iter().map(|(name, _)| *name).collect();
        eprintln!("KILN_FUZZ_TARGET: {name:?} is none of {}", known.join(", "));
        std::process::exit(2);
    })
});

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| TARGET(bytes));
